"""Volumes of a storage server on VDUSE devices: they follow from node to node, and a node cut off writes no more.

The nodes are two drivers in one VM, with node ids, registries and run directories of their own. One kernel has
one device of a name, so the second node knows the volume by another id: it is told all it needs by
ControllerPublishVolume, as a node whose registry does not have the volume.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from tests.vm.conftest import kill, wait_until
from tests.vm.csi import MIB, Driver, Volume, block, mount, refused
from tests.vm.exports import tool
from tests.vm.test_sanity import standalone, storage_server

SIZE_MIB = 16
NODE, OTHER_NODE = "vm", "vm2"
# A worker that is refused asks again every 5 s at most; this is several times that.
REFUSED_FOR_S = 20


@contextlib.contextmanager
def node(directory: Path, server: Path, node_id: str, *peers: str) -> Iterator[Driver]:
    directory.mkdir()
    options = tuple(f"--peer-node={peer}" for peer in peers)
    pool = f"nbd:unix:{server}/control.sock"
    running = standalone(directory, default=pool, node_id=node_id, options=options)
    with running as endpoint, grpc.insecure_channel(f"unix:{endpoint}") as channel:
        (directory / "staging").mkdir()
        yield Driver(directory, channel)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def first(server: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    directory = tmp_path_factory.mktemp("nodes") / "first"
    with storage_server(server), node(directory, server, NODE, OTHER_NODE) as running:
        yield running


def write(disk: Path, data: bytes, at: int = 0) -> None:
    with disk.open("r+b") as file:
        file.seek(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def read(disk: Path, length: int) -> bytes:
    """Read from the device, not from what the kernel remembers of it."""
    with disk.open("rb") as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read(length)


def test_a_file_system_follows_its_volume_and_grows(first: Driver) -> None:
    volume = first.create("follows", SIZE_MIB)
    data = os.urandom(MIB)
    for _ in range(2):
        told = first.give(volume, NODE, mount("ext4"))
        path = first.stage(volume, mount("ext4"), told=told)
        if not (path / "data").exists():
            (path / "data").write_bytes(data)
        assert (path / "data").read_bytes() == data
        first.unstage(volume)
        first.take(volume, NODE)
    told = first.give(volume, NODE, mount("ext4"))
    path = first.stage(volume, mount("ext4"), told=told)
    assert first.expand(volume, path, 2 * SIZE_MIB) == 2 * SIZE_MIB * MIB
    assert (path / "data").read_bytes() == data
    copy = first.create("copy", 2 * SIZE_MIB, source=volume)
    first.unstage(volume)
    first.take(volume, NODE)
    path = first.stage(copy, mount("ext4"), told=first.give(copy, NODE, mount("ext4")))
    assert (path / "data").read_bytes() == data
    first.unstage(copy)
    first.take(copy, NODE)
    first.delete(volume)
    first.delete(copy)
    assert first.leftovers() == []


def test_a_daemon_that_is_killed_under_load_loses_nothing(first: Driver, server: Path) -> None:
    volume = first.create("killed", SIZE_MIB)
    first.stage(volume, block(), told=first.give(volume, NODE, block()))
    disk = first.publish(volume, "killed", block())
    expected = b""
    for _ in range(3):
        data = os.urandom(MIB)
        writer = subprocess.Popen(
            [
                "dd",
                f"of={disk}",
                "bs=64k",
                f"seek={len(expected) >> 16}",
                "oflag=direct",
                "conv=notrunc,fsync",
            ],
            stdin=subprocess.PIPE,
        )
        assert writer.stdin is not None
        writer.stdin.write(data[: MIB // 2])
        writer.stdin.flush()
        os.kill(daemon_pid(server), signal.SIGKILL)
        writer.communicate(data[MIB // 2 :], timeout=120)
        assert writer.returncode == 0
        expected += data
    assert read(disk, len(expected)) == expected
    first.unpublish(volume, "killed")
    first.unstage(volume)
    first.take(volume, NODE)
    first.delete(volume)


def daemon_pid(server: Path) -> int:
    """The process that has the server's monitor open; it may just be being started."""
    found: list[int] = []

    def look() -> bool:
        argument = f"path={server}/run/qmp.sock".encode()
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if argument in entry.read_bytes():
                    found.append(int(entry.parent.name))
        return bool(found)

    wait_until(look, "a qemu-storage-daemon", 120)
    return found[0]


@pytest.mark.parametrize("plain", ["nbdkit", "nbd-server", "qemu-nbd"])
def test_an_export_made_beforehand_is_mounted_by_its_uri(
    plain: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, first: Driver
) -> None:
    image, socket = tmp_path / "image", tmp_path / "plain.sock"
    with image.open("wb") as file:
        file.truncate(SIZE_MIB * MIB)
    tool("mkfs.ext4", "-q", image)
    argv, uri = plain_server(plain, image, socket, tmp_path)
    process = subprocess.Popen(argv)
    try:
        volume = Volume(f"erp/{plain}", f"erp-{plain}")
        attributes = {"uri": uri}  # nbd-server allows one connection, the others several: each says so
        wait_until(lambda: can_stage(first, volume, attributes), "staging", 120)
        path = first.staging(volume)
        (path / "data").write_bytes(b"static" * 1000)
        first.unstage(volume)
        first.stage(volume, mount("ext4"), attributes=attributes)
        assert (path / "data").read_bytes() == b"static" * 1000
        first.unstage(volume)
    finally:
        process.terminate()
        process.wait(60)
        if plain == "nbd-server":  # it goes to the background; what stays in the foreground serves one client
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)
    tool("e2fsck", "-fn", image)


def can_stage(driver: Driver, volume: Volume, attributes: dict[str, str]) -> bool:
    """Stage; False while the server is not up."""
    try:
        driver.stage(volume, mount("ext4"), attributes=attributes)
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False
    return True


def plain_server(name: str, image: Path, socket: Path, directory: Path) -> tuple[list[str], str]:
    over_socket = f"nbd+unix:///x?socket={socket}"
    match name:
        case "nbdkit":
            return ["nbdkit", "-f", "-U", str(socket), "-e", "x", "file", str(image)], over_socket
        case "qemu-nbd":
            argv = ["qemu-nbd", "-t", "-k", str(socket), "-x", "x", "-f", "raw", "-e", "8", str(image)]
            return argv, over_socket
    config = directory / "config"
    config.write_text(f"[generic]\nport = 10899\nlistenaddr = 127.0.0.1\n[x]\nexportname = {image}\n")
    return ["nbd-server", "-C", str(config), "-p", str(directory / "pid")], "nbd://127.0.0.1:10899/x"


def attachment_record(driver: Driver, volume: Volume) -> dict[str, Any]:
    """What the agent has written down about a volume."""
    return json.loads((driver.directory / f"run/volumes/{volume.id}/record.json").read_text())


def served_uri(driver: Driver, volume: Volume) -> str:
    """Where a volume's worker finds its export, which is another one than was published."""
    uri: str = attachment_record(driver, volume)["backend"]["uri"]
    return uri


def test_each_worker_has_an_export_of_its_own_and_nothing_is_published_anew(
    first: Driver, server: Path
) -> None:
    volume = first.create("renewed", SIZE_MIB)
    told = first.give(volume, NODE, block())
    first.stage(volume, block(), told=told)
    disk = first.publish(volume, "renewed", block())
    uris = [told["uri"], served_uri(first, volume)]
    expected = b""
    for _ in range(3):
        pid = attachment_record(first, volume)["worker_pid"]
        kill(pid)
        data = os.urandom(MIB)
        write(disk, data, len(expected))
        expected += data
        wait_until(lambda dead=pid: attachment_record(first, volume)["worker_pid"] != dead, "another worker")
        uris.append(served_uri(first, volume))
    assert len(set(uris)) == len(uris)
    assert first.give(volume, NODE, block()) == told
    first.stage(volume, block(), told=told)
    assert read(disk, len(expected)) == expected
    for _ in range(2):  # as a node that was reset stages again what it had been given
        first.unpublish(volume, "renewed")
        first.unstage(volume)
        first.stage(volume, block(), told=told)
        disk = first.publish(volume, "renewed", block())
        assert served_uri(first, volume) not in uris
        uris.append(served_uri(first, volume))
        assert read(disk, len(expected)) == expected
    first.unpublish(volume, "renewed")
    first.unstage(volume)
    first.take(volume, NODE)
    first.delete(volume)
    assert first.leftovers() == []


def test_a_node_that_lost_its_volume_cannot_write_any_more(
    first: Driver, server: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The first node hears nothing: neither unstage nor detach. It is cut off at the server."""
    volume, there = first.create("fenced", SIZE_MIB), Volume("fenced-there", "fenced-there")
    told = first.give(volume, NODE, block())
    first.stage(volume, block(), told=told)
    disk = first.publish(volume, "fenced", block())
    data = os.urandom(4 * MIB)
    write(disk, data)
    with refused(grpc.StatusCode.FAILED_PRECONDITION, f"published at {NODE}"):
        first.give(volume, OTHER_NODE, block())
    first.take(volume, NODE)
    told_there = first.give(volume, OTHER_NODE, block())
    assert int(told_there["epoch"]) > int(told["epoch"])
    with node(tmp_path_factory.mktemp("other") / "second", server, OTHER_NODE) as second:
        second.stage(there, block(), told=told_there)
        disk_there = second.publish(there, "fenced", block())
        assert read(disk_there, len(data)) == data
        new = os.urandom(MIB)
        write(disk_there, new)
        late = subprocess.Popen(
            ["dd", "if=/dev/zero", f"of={disk}", "bs=1M", "count=1", "oflag=direct", "conv=notrunc"]
        )
        with pytest.raises(subprocess.TimeoutExpired):
            late.wait(REFUSED_FOR_S)
        assert read(disk_there, len(data)) == new + data[MIB:], "the first node has written"
        with refused(grpc.StatusCode.ALREADY_EXISTS, "published anew"):
            first.stage(volume, block(), told=told_there)
        second.unpublish(there, "fenced")
        second.unstage(there)
        first.take(volume, OTHER_NODE)
    with decoy(server, served_uri(first, volume)):
        late.wait(120)
        first.unpublish(volume, "fenced")
        first.unstage(volume)
    assert first.leftovers() == []


@contextlib.contextmanager
def decoy(server: Path, uri: str) -> Iterator[None]:
    """Let the first node's held write end, so that its disk can be removed: into a void of the export's name.

    The storage server is stopped for it, and with it all that was right: this comes last.
    """
    export = uri.partition("///")[2].partition("?")[0]
    pid = daemon_pid(server)
    supervisor = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(supervisor, signal.SIGTERM)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), "the end of the storage server", 120)
    (server / "nbd.sock").unlink(missing_ok=True)
    argv = [
        "qemu-storage-daemon",
        "--blockdev",
        f"driver=null-co,node-name=n,read-zeroes=on,size={SIZE_MIB * MIB}",
    ]
    argv += ["--nbd-server", f"addr.type=unix,addr.path={server}/nbd.sock"]
    argv += ["--export", f"type=nbd,id=x,node-name=n,name={export},writable=on"]
    process = subprocess.Popen(argv)
    try:
        yield
    finally:
        process.terminate()
        process.wait(60)
