"""Network cards of a vhost-user-net server: two network namespaces exchange data through DPDK's testpmd."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyroute2 import netns

from csi_vduse.proto import agent_pb2
from lab import rte_vhost
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.test_agent import VIRTIO, detach, inspect
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


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, timeout=60)


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    """The first one mounts /run/netns for good."""
    ip("netns", "add", NAMES[0])
    ip("netns", "delete", NAMES[0])


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


@contextmanager
def sending(sender: str, receiver: str, address: str) -> Iterator[Receiver]:
    """Send from one namespace to the other; at the end of the body all is to come, and as it was sent."""
    receives = Receiver(receiver, address)
    receives.start()
    receives.listening.wait()
    sends = Sender(sender, address)
    sends.start()
    yield receives
    for each in (sends, receives):
        each.join(CALL_TIMEOUT_S * 10)
        assert not each.is_alive()
    assert receives.received_bytes == SENT_BYTES
    assert receives.digest.digest() == sends.digest.digest()


def test_two_network_namespaces_exchange_data_while_everything_is_killed(
    shared: RunningAgent, tmp_path: Path
):
    with leaves_nothing(shared), serving(Switch(tmp_path)) as switch, ExitStack() as up:
        for number, (name, path) in enumerate(zip(NAMES, switch.sockets, strict=True), 1):
            up.callback(detach, shared, name)
            up.enter_context(plugged(attach(shared, name, path), name, f"198.51.100.{number}"))
        with sending(*NAMES, "198.51.100.2") as receiver:
            for number in range(1, KILLS + 1):
                enough = number * SENT_BYTES // (KILLS + 1)
                wait_until(lambda enough=enough: receiver.received_bytes > enough, "data")
                switch.kill()
                switch.start()
            kill(inspect(shared, NAMES[0]).attachment.worker_pid)


IPAM = """#!/bin/sh
cat > /dev/null
echo '{"ips": [{"address": "198.51.100.'$((0x$(echo $CNI_CONTAINERID | cut -c5)))'/24"}]}'
"""


def cni(command: str, container: str, folder: Path, **network: object) -> dict[str, Any]:
    """Ask the plugin as a container runtime does."""
    config = {
        "cniVersion": "1.1.0",
        "name": "fast",
        "type": "csi-vduse-net",
        "socket": str(folder / "{container}.sock"),
        "ipam": {"type": "ipam"},
        **network,
    }
    environment = {
        "CNI_COMMAND": command,
        "CNI_CONTAINERID": container,
        "CNI_NETNS": f"/run/netns/{container}",
        "CNI_IFNAME": "fast0",
        "CNI_PATH": str(folder),
    }
    done = subprocess.run(
        ["csi-vduse", "cni"],
        input=json.dumps(config),
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        timeout=CALL_TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout
    said: dict[str, Any] = json.loads(done.stdout) if done.stdout else {}
    return said


def test_pods_get_cards_by_the_cni_plugin(shared: RunningAgent, tmp_path: Path):
    """Two of them reach each other; what a DEL did not remove is collected."""
    where = {"runDir": str(shared.run_dir)}
    (tmp_path / "ipam").write_text(IPAM)
    (tmp_path / "ipam").chmod(0o755)
    with leaves_nothing(shared), serving(Switch(tmp_path)), ExitStack() as up:
        results = {}
        for name in NAMES:
            ip("netns", "add", name)
            up.callback(ip, "netns", "delete", name)
            results[name] = cni("ADD", name, tmp_path, **where)
        (interface,) = results[NAMES[0]]["interfaces"]
        assert interface["name"] == "fast0"
        (link,) = json.loads(
            subprocess.check_output(["ip", "-json", "-netns", NAMES[0], "link", "show", "fast0"], text=True)
        )
        assert link["address"] == interface["mac"]
        with sending(*NAMES, "198.51.100.11"):
            pass
        cni("CHECK", NAMES[0], tmp_path, prevResult=results[NAMES[0]], **where)
        cni("DEL", NAMES[0], tmp_path, **where)
        cni("GC", NAMES[1], tmp_path, **where, **{"cni.dev/valid-attachments": []})
