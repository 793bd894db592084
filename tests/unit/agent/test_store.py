from __future__ import annotations

from pathlib import Path

from csi_vduse.agent.store import Store


def test_a_handover_needs_no_longer_socket_path_than_an_attach():
    """The length of the run directory's path is checked for attaches; a longer one would fail at the first upgrade."""
    store = Store(Path("/run/volumes"))
    assert len(str(store.next_control_path("vol"))) <= len(str(store.control_path("vol")))
