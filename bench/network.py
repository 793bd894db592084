"""The network of the part `remote`: a storage machine, and a cable from it to the guest.

The storage machine is a network namespace of the host with the server in it; the cable is a tap device of it, the guest's
second card. So the server has processors of its own, as a storage server has, and every request crosses a network.
Kept true: the namespace goes with the measurement.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from bench.servers import BenchError, running, tool, undone_by
from lab.tap import Nic

SERVER, CLIENT = "192.0.2.1", "192.0.2.2"
_NIC = Nic("csi-vduse-bench", "tap0", "52:54:00:c5:be:01")


@contextmanager
def storage_machine(server: Sequence[str]) -> Iterator[Nic]:
    """On the host: run a server there, and yield the guest's card."""
    tool("ip", "netns", "add", _NIC.namespace)
    with undone_by("ip", "netns", "delete", _NIC.namespace):
        for line in (
            "link set lo up",
            f"tuntap add {_NIC.device} mode tap vnet_hdr",
            f"address add {SERVER}/24 dev {_NIC.device}",
            f"link set {_NIC.device} up",
        ):
            tool("ip", "-netns", _NIC.namespace, *line.split())
        with running(["ip", "netns", "exec", _NIC.namespace, *server]):
            yield _NIC


def plug_in() -> None:
    """In the guest: give that card its address.

    Raises BenchError when there is no such card.
    """
    for path in Path("/sys/class/net").iterdir():
        if (path / "address").read_text().strip() == _NIC.mac:
            tool("ip", "address", "add", f"{CLIENT}/24", "dev", path.name)
            tool("ip", "link", "set", path.name, "up")
            return
    raise BenchError(
        "there is no cable to a storage machine: it takes a machine of the laboratory (or `loopback`)"
    )
