"""Network cards of a vhost-user-net server: two network namespaces exchange data through DPDK's testpmd."""

from __future__ import annotations

import hashlib
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from pyroute2 import netns

from csi_vduse.proto import agent_pb2
from lab import rte_vhost
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.test_agent import VIRTIO
from tests.vm.vhost_user_servers import Server, serving

pytestmark = pytest.mark.emulated("DPDK's thread never sleeps: it needs a processor that others do not")

SENT_BYTES = int(os.environ.get("NETWORK_MIB", "64")) * MIB
PIECE_BYTES = MIB
KILLS = 3
NAMES = ("net-a", "net-b")
PORT = 4000


class Switch(Server):
    """testpmd, with a socket for each of two cards."""

    def __init__(self, folder: Path) -> None:
        self.sockets = [folder / f"{name}.sock" for name in NAMES]
        super().__init__(self.sockets[0], rte_vhost.testpmd(*self.sockets))

    def start(self) -> None:
        for path in self.sockets:
            path.unlink(missing_ok=True)  # else it does not listen there again
        super().start()


def attach(agent: RunningAgent, name: str, path: Path) -> str:
    """A card; returns its interface."""
    backend = agent_pb2.Backend(vhost_user=agent_pb2.VhostUserBackend(socket=str(path)))
    request = agent_pb2.AttachRequest(volume_id=name, backend=backend, bus=VIRTIO, is_network=True)
    return Path(agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path).name


def detach(agent: RunningAgent, name: str) -> None:
    agent.stub.Detach(agent_pb2.DetachRequest(volume_id=name), timeout=CALL_TIMEOUT_S)


def inspect(agent: RunningAgent, name: str) -> agent_pb2.InspectResponse:
    return agent.stub.Inspect(agent_pb2.InspectRequest(volume_id=name), timeout=CALL_TIMEOUT_S)


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=60)


@contextmanager
def plugged(interface: str, namespace: str, address: str) -> Iterator[None]:
    """An interface in a network namespace of its own."""
    ip("netns", "add", namespace)
    try:
        ip("link", "set", interface, "netns", namespace)
        ip("-netns", namespace, "address", "add", f"{address}/24", "dev", interface)
        ip("-netns", namespace, "link", "set", interface, "up")
        yield
    finally:
        ip("netns", "delete", namespace)


class Receiver(threading.Thread):
    """Takes what comes in a network namespace."""

    def __init__(self, namespace: str, address: str) -> None:
        super().__init__(daemon=True)
        self.digest = hashlib.sha256()
        self.received_bytes = 0
        self._namespace, self._address = namespace, address
        self.listening = threading.Event()

    def run(self) -> None:
        netns.setns(self._namespace)
        with socket.create_server((self._address, PORT)) as listener:
            self.listening.set()
            with listener.accept()[0] as connection:
                while data := connection.recv(PIECE_BYTES):
                    self.digest.update(data)
                    self.received_bytes += len(data)


class Sender(threading.Thread):
    """Sends from another one."""

    def __init__(self, namespace: str, address: str) -> None:
        super().__init__(daemon=True)
        self.digest = hashlib.sha256()
        self._namespace, self._address = namespace, address

    def run(self) -> None:
        netns.setns(self._namespace)
        with socket.create_connection((self._address, PORT)) as connection:
            for _ in range(SENT_BYTES // PIECE_BYTES):
                piece = os.urandom(PIECE_BYTES)
                self.digest.update(piece)
                connection.sendall(piece)


def test_two_network_namespaces_exchange_data_while_everything_is_killed(
    shared: RunningAgent, tmp_path: Path
):
    ip("netns", "add", NAMES[0])  # the first one mounts /run/netns for good
    ip("netns", "delete", NAMES[0])
    with leaves_nothing(shared), serving(Switch(tmp_path)) as switch, ExitStack() as up:
        for number, (name, path) in enumerate(zip(NAMES, switch.sockets, strict=True), 1):
            up.callback(detach, shared, name)
            up.enter_context(plugged(attach(shared, name, path), name, f"198.51.100.{number}"))
        receiver = Receiver(NAMES[1], "198.51.100.2")
        receiver.start()
        receiver.listening.wait()
        sender = Sender(NAMES[0], "198.51.100.2")
        sender.start()
        for number in range(1, KILLS + 1):
            enough = number * SENT_BYTES // (KILLS + 1)
            wait_until(lambda enough=enough: receiver.received_bytes > enough, "data")
            switch.kill()
            switch.start()
        kill(inspect(shared, NAMES[0]).attachment.worker_pid)
        for each in (sender, receiver):
            each.join(CALL_TIMEOUT_S * 10)
            assert not each.is_alive()
        assert receiver.received_bytes == SENT_BYTES
        assert receiver.digest.digest() == sender.digest.digest()
