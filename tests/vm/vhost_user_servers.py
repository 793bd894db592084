"""Vhost-user servers that keep the log of what is in flight, and volumes that they serve."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_vduse.proto import agent_pb2
from lab import rte_vhost
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent
from tests.vm.test_agent import VIRTIO

VOLUME = "vol-0123456789abcdef"


class Server:
    """A server of one disk with two queues, which argv starts."""

    def __init__(self, socket: Path, argv: list[str]) -> None:
        self.socket = socket
        self._argv = argv

    def start(self) -> None:
        """Start it; returns when it can be connected to."""
        self.process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, text=True)
        assert self.process.stdout
        while self.process.stdout.readline().strip() != str(self.socket):
            assert self.process.poll() is None

    def hang(self) -> None:
        """Have it answer nothing any more, until it is killed."""
        self.process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(60)
        assert self.process.stdout
        self.process.stdout.close()


def ours(socket: Path, image: Path) -> Server:
    argv = ["csi-vduse", "export", "--vhost-user", str(socket), "--backend", f"file:{image}", "--queues", "2"]
    return Server(socket, [*argv, "disk"])


def rte(socket: Path, image: Path) -> Server:
    return Server(socket, rte_vhost.command(socket, image, queues=2))


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
