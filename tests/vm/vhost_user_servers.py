"""Vhost-user servers that keep the log of what is in flight, and volumes that they serve."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_vduse.proto import agent_pb2
from lab import rte_vhost
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, wait_until
from tests.vm.test_agent import VIRTIO

VOLUME = "vol-0123456789abcdef"


class Server:
    """A server of one disk with two queues, which argv starts."""

    def __init__(self, socket_path: Path, argv: list[str]) -> None:
        self.socket = socket_path
        self._argv = argv

    def start(self) -> None:
        """Start it; returns when it can be connected to."""
        self.socket.unlink(missing_ok=True)
        self.process = subprocess.Popen(self._argv, stdout=subprocess.DEVNULL, text=True)
        wait_until(lambda: self._listens() or self.process.poll() is not None, "a socket")
        assert self.process.poll() is None

    def _listens(self) -> bool:
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(self.socket)) == 0

    def hang(self) -> None:
        """Have it answer nothing any more, until it is killed."""
        self.process.send_signal(signal.SIGSTOP)
        tasks = Path(f"/proc/{self.process.pid}/task")
        wait_until(
            lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()),
            "a stop of all threads",
        )

    def grow(self, image: Path, size_bytes: int) -> None:
        """Make its disk larger, of which it tells by itself: one of ours."""
        os.truncate(image, size_bytes)
        self.process.send_signal(signal.SIGHUP)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)


def ours(socket_path: Path, image: Path) -> Server:
    argv = [
        "csi-vduse",
        "export",
        "--vhost-user",
        str(socket_path),
        "--backend",
        f"file:{image}",
        "--queues",
        "2",
    ]
    return Server(socket_path, [*argv, "disk"])


def rte(socket_path: Path, image: Path) -> Server:
    return Server(socket_path, rte_vhost.command(socket_path, image, queues=2))


def qsd(socket_path: Path, image: Path) -> Server:
    """Which keeps no log: it is mediated."""
    node = f"driver=file,node-name=n,filename={image},locking=off,discard=unmap"
    export = f"type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path={socket_path},writable=on,num-queues=2"
    return Server(socket_path, ["qemu-storage-daemon", "--blockdev", node, "--export", export])


@contextmanager
def serving(server: Server) -> Iterator[Server]:
    server.start()
    try:
        yield server
    finally:
        server.kill()


def attach(agent: RunningAgent, server: Server, **changes: object) -> str:
    backend = agent_pb2.Backend(vhost_user=agent_pb2.VhostUserBackend(socket=str(server.socket)))
    fields: dict[str, object] = {"volume_id": VOLUME, "capacity_bytes": 16 * MIB, "bus": VIRTIO, **changes}
    request = agent_pb2.AttachRequest(backend=backend, **fields)  # type: ignore[arg-type]
    path: str = agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path
    return path
