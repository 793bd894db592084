"""A volume on vhost_vdpa is a whole disk to a client that is not ours: QEMU's block layer with libblkio."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.errors import CommandFailed
from lab.vhost_client import VhostClient, obtain
from tests.vm import vhost_user_servers
from tests.vm.vhost_user_servers import Server, serving

MIB = 1 << 20
IMAGE_BYTES = 64 * MIB
STOP_TIMEOUT_S = 120
SEEDED = random.Random(7).randbytes(256 * 1024)
SEEDED_AT = 3 * MIB + 4096


pytestmark = pytest.mark.emulated("a client of VMs, which shares memory with the kernel as on a node")


@pytest.fixture
def client() -> VhostClient:
    subprocess.run(["modprobe", "--all", "vduse", "virtio-vdpa", "vhost-vdpa"], check=True, timeout=60)
    return obtain()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
        file.seek(SEEDED_AT)
        file.write(SEEDED)
    return path


@contextlib.contextmanager
def exported(image: Path, name: str, *options: str, backend: str = "") -> Iterator[Path]:
    """The device of a running `csi-vduse export`, of the image unless told; checks at the end that it went away."""
    argv = [str(Path(sys.executable).parent / "csi-vduse"), "export", "--bus", "vhost_vdpa", *options]
    log = image.with_suffix(".log")
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*argv, "--backend", backend or f"file:{image}", name],
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    assert process.stdout is not None
    try:
        device = process.stdout.readline().strip()
        assert device, log.read_text()
        yield Path(device)
        process.send_signal(signal.SIGTERM)
        assert process.wait(STOP_TIMEOUT_S) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        sys.stdout.write(log.read_text()[-10000:])  # shown if the test fails
    assert not Path(device).exists()
    assert not Path("/dev/vduse", name).exists()
    assert not Path("/sys/bus/vdpa/devices", name).exists()


def disks() -> set[str]:
    return {path.name for path in Path("/sys/block").glob("vd*")}


def content(image: Path, offset_bytes: int, length_bytes: int) -> bytes:
    with image.open("rb") as file:
        return os.pread(file.fileno(), length_bytes, offset_bytes)


def test_a_vm_side_client_reads_and_writes_the_image_and_the_host_sees_no_disk(
    client: VhostClient, image: Path
) -> None:
    before = disks()
    with exported(image, "vm-disk") as device:
        assert device.is_char_device()
        assert Path("/sys/bus/vdpa/devices/vm-disk/driver").resolve().name == "vhost_vdpa"
        assert disks() == before
        assert client.read(device, SEEDED_AT, len(SEEDED)) == SEEDED
        commands = ["write -P 0x5a 8M 1M", "write -P 0xa5 8704k 4k", "flush", "read -P 0xa5 8704k 4k"]
        client.run(device, commands)
        # flushed while the device is still there: the bytes have to be in the image by now
        assert content(image, 8 * MIB, 512 * 1024) == b"\x5a" * (512 * 1024)
        assert content(image, 8 * MIB + 512 * 1024, 4096) == b"\xa5" * 4096
        assert content(image, 8 * MIB + 516 * 1024, 4096) == b"\x5a" * 4096
        assert disks() == before
    assert content(image, SEEDED_AT, len(SEEDED)) == SEEDED
    assert content(image, 9 * MIB, MIB) == bytes(MIB)


@pytest.mark.parametrize("make", [vhost_user_servers.ours, vhost_user_servers.rte])
def test_a_vhost_user_server_works_on_the_rings_of_a_vm(
    client: VhostClient, image: Path, tmp_path: Path, make: Callable[[Path, Path], Server]
) -> None:
    """In the VM's memory, which is a file of the VM's."""
    with (
        serving(make(tmp_path / "sock", image)) as server,
        exported(image, "vm-disk", backend=f"vhost-user:{server.socket}") as device,
    ):
        assert client.read(device, SEEDED_AT, len(SEEDED)) == SEEDED
        client.run(device, ["write -P 0x5a 8M 1M", "flush", "read -P 0x5a 8M 1M"])
        assert content(image, 8 * MIB, MIB) == b"\x5a" * MIB
        server.kill()
        server.start()
        client.run(device, ["write -P 0xa5 8M 64k", "flush", "read -P 0xa5 8M 64k"])
    assert content(image, 8 * MIB, 64 * 1024) == b"\xa5" * (64 * 1024)


def test_discard_and_write_zeroes_of_a_vm_read_back_as_zeros(client: VhostClient, image: Path) -> None:
    with exported(image, "vm-disk") as device:
        used = image.stat().st_blocks
        client.run(device, ["write -P 1 16M 4M", "flush"])
        assert image.stat().st_blocks > used
        client.run(device, ["write -z 16M 2M", "discard 18M 2M", "flush", "read -P 0 16M 2M"])
    assert content(image, 16 * MIB, 2 * MIB) == bytes(2 * MIB)
    assert image.stat().st_blocks * 512 < used * 512 + 4 * MIB


def test_a_vm_cannot_write_a_read_only_volume(client: VhostClient, image: Path) -> None:
    with exported(image, "vm-disk", "--read-only") as device, pytest.raises(CommandFailed):
        client.run(device, ["write -P 0x11 0 4096", "flush"])
    assert content(image, 0, 4096) == bytes(4096)
