"""A server that is killed with requests in flight: the next one answers them, each once."""

from __future__ import annotations

import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from csi_vduse.dataplane.vhost_user.inflight import count
from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.vhost_user.exported import Exported
from tests.vhost_user.frontend import SIZE, Frontend, state

HEADS = (0, 3, 6, 9)


def connect(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(path))
    return sock


def test_what_is_in_flight_at_a_kill_is_answered_by_the_next_server(
    export: Callable[..., Exported], image: Path, tmp_path: Path
) -> None:
    path = tmp_path / "held.sock"
    held = subprocess.Popen(
        [sys.executable, "-m", "tests.vhost_user.held_server", str(path), str(image)],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
    )
    try:
        assert held.stdout is not None
        assert held.stdout.readline()
        frontend = Frontend(connect(path))
        frontend.negotiate()
        frontend.give_memory()
        frontend.send(Request.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, 1, SIZE))
        description, log = frontend.receive_fd()
        frontend.give_ring()
        frontend.enable()
        for head in HEADS:
            frontend.describe(head)
            frontend.make_available(head)
        while frontend.used() < 1:
            time.sleep(0.01)
        while not in_flight(log):
            time.sleep(0.01)
    finally:
        held.kill()
        held.wait()
        held.stdout.close()
    answered, left = frontend.used(), in_flight(log)
    assert 0 < answered < len(HEADS)
    assert left

    exported = export(f"file:{image}")
    frontend.reconnect(connect(exported.socket))
    frontend.negotiate()
    frontend.give_memory()
    assert frontend.acked(Request.SET_INFLIGHT_FD, description, (log,))
    frontend.give_ring(base=answered)
    frontend.enable()
    while frontend.used() < len(HEADS):
        assert frontend.signalled(frontend.call)
    assert sorted(frontend.used_ids()) == list(HEADS)
    assert f"served_again={left}" in exported.log_text()
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, len(HEADS))
    assert in_flight(log) == 0
    frontend.close()
    os.close(log)


def in_flight(log: int) -> int:
    return count(memoryview(os.pread(log, 4096, 0)), packed=False)
