"""Real NBD servers that count their clients, behind an export: one connection is enough for one queue."""

from __future__ import annotations

import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import NbdBackend
from csi_vduse.dataplane.nbd_config import probe
from csi_vduse.errors import Unavailable
from lab.vhost_client import VhostClient, obtain
from tests.vhost_user.conftest import MIB
from tests.vhost_user.exported import Exported
from tests.vhost_user.test_block_client import content, wait_for

Export = Callable[..., Exported]
STOP_TIMEOUT_S = 30


@pytest.fixture
def client() -> VhostClient:
    return replace(obtain(), driver="virtio-blk-vhost-user")


def free_port() -> int:
    with socket.socket() as probe_socket:
        probe_socket.bind(("127.0.0.1", 0))
        port: int = probe_socket.getsockname()[1]
        return port


def counting_server(kind: str, image: Path, folder: Path) -> tuple[list[str], str]:
    """How to start a server that serves one client at a time, and where it is."""
    path, port = folder / "nbd.sock", free_port()
    over_socket = f"nbd+unix:///x?socket={path}"
    match kind:
        case "qemu-nbd":  # which ends with its first client, too
            return ["qemu-nbd", "-k", str(path), "-x", "x", "-f", "raw", str(image)], over_socket
        case "nbdkit":
            options = ["-f", "-U", str(path), "--filter=limit", "file", str(image), "limit=1"]
            return ["nbdkit", *options], over_socket
    config = folder / "config"
    config.write_text(
        f"[generic]\nport = {port}\nlistenaddr = 127.0.0.1\n[x]\nexportname = {image}\nmaxconnections = 1\n"
    )
    return ["nbd-server", "-d", "-C", str(config)], f"nbd://127.0.0.1:{port}/x"


@contextmanager
def serving(argv: list[str], uri: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL)
    try:
        wait_for(lambda: listens(uri))
        yield process
    finally:
        process.kill()
        process.wait(STOP_TIMEOUT_S)


def listens(uri: str) -> bool:
    """Without connecting to it: that would be the one client that it takes."""
    if "socket=" in uri:
        return Path(uri.partition("socket=")[2]).exists()
    port = int(uri.rpartition(":")[2].partition("/")[0])
    listening = {line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines() if " 0A " in line}
    return f"0100007F:{port:04X}" in listening


@pytest.mark.parametrize("kind", ["qemu-nbd", "nbdkit", "nbd-server"])
def test_a_server_of_one_client_serves_a_disk_whoever_comes_and_goes(
    kind: str, export: Export, client: VhostClient, image: Path, tmp_path: Path
) -> None:
    argv, uri = counting_server(kind, image, tmp_path)
    with serving(argv, uri) as server:
        exported = export(uri, "--queues", "1")
        for number in range(1, 4):
            client.run(exported.socket, [f"write -P {number} {number}M 64k", "flush"])
        client.run(exported.socket, ["read -P 1 1M 64k", "read -P 3 3M 64k"])
        assert exported.stop() == 0
        if kind == "qemu-nbd":
            assert server.wait(STOP_TIMEOUT_S) == 0
    assert content(image, 2 * MIB, 65536) == b"\x02" * 65536


def test_asking_again_and_again_is_not_one_client_too_many(image: Path, tmp_path: Path) -> None:
    argv, uri = counting_server("nbdkit", image, tmp_path)
    with serving(argv, uri):
        for _ in range(20):
            assert probe(NbdBackend(uri), timeout_s=5).size_bytes == image.stat().st_size


def test_a_server_that_has_its_client_already_is_told_apart_from_one_that_is_down(
    export: Export, image: Path, tmp_path: Path
) -> None:
    argv, uri = counting_server("nbdkit", image, tmp_path)
    with serving(argv, uri) as server:
        export(uri, "--queues", "1")
        with pytest.raises(Unavailable, match=r"before it said anything.*no more clients"):
            probe(NbdBackend(uri), timeout_s=5)
        server.send_signal(signal.SIGKILL)
        server.wait(STOP_TIMEOUT_S)
        with pytest.raises(Unavailable, match=r"Connection refused.*ends with its first client"):
            probe(NbdBackend(uri), timeout_s=5)


def test_a_server_that_lets_a_second_client_wait_is_told_apart(
    export: Export, image: Path, tmp_path: Path
) -> None:
    argv, uri = counting_server("qemu-nbd", image, tmp_path)
    with serving(argv, uri):
        export(uri, "--queues", "1")
        with pytest.raises(Unavailable, match=r"says nothing.*one client"):
            probe(NbdBackend(uri), timeout_s=1)
