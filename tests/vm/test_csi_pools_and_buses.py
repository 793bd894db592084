"""What a volume's parameters choose, over CSI: pools whose file systems share blocks, and the bus of VMs."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.vm.csi import MIB, Driver, block, driver_in
from tests.vm.exports import tool

REFLINK_POOLS = {"xfs": ("mkfs.xfs", "-q", "-f", "-m", "reflink=1"), "btrfs": ("mkfs.btrfs", "-q", "-f")}
DATA_BYTES = 32 * MIB


@pytest.fixture(scope="module")
def pools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a pool on each file system that can share blocks between files."""
    directory = tmp_path_factory.mktemp("pools")
    tool("modprobe", "loop")
    with contextlib.ExitStack() as undo:
        for name, mkfs in REFLINK_POOLS.items():
            disk, pool = directory / f"{name}.disk", directory / name
            pool.mkdir()
            with disk.open("wb") as file:
                file.truncate(400 * MIB)
            tool(*mkfs, disk)
            tool("mount", "-o", "loop", disk, pool)
            undo.callback(tool, "umount", pool)
        yield directory


@pytest.fixture(scope="module")
def driver(pools: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    with driver_in(tmp_path_factory.mktemp("driver"), *(pools / name for name in REFLINK_POOLS)) as running:
        yield running


def used_bytes(directory: Path) -> int:
    """Return what a file system has allocated."""
    os.sync()
    system = os.statvfs(directory)
    return (system.f_blocks - system.f_bfree) * system.f_frsize


@pytest.mark.parametrize("pool", REFLINK_POOLS)
def test_a_clone_shares_the_blocks_of_its_source_and_not_its_future(
    driver: Driver, pools: Path, pool: str
) -> None:
    volume = driver.create(f"source-{pool}", 64, pool=pool)
    data = os.urandom(DATA_BYTES)
    driver.stage(volume, block())
    with driver.publish(volume, f"source-{pool}", block()).open("r+b") as disk:
        disk.write(data)
        disk.flush()
        os.fsync(disk.fileno())
    before = used_bytes(pools / pool)
    clone = driver.create(f"clone-{pool}", 64, source=volume, pool=pool)
    assert used_bytes(pools / pool) - before < DATA_BYTES // 8
    driver.stage(clone, block())
    with driver.publish(clone, f"clone-{pool}", block()).open("r+b") as disk:
        assert hashlib.sha256(disk.read(DATA_BYTES)).digest() == hashlib.sha256(data).digest()
        disk.seek(0)
        disk.write(bytes(MIB))
        disk.flush()
        os.fsync(disk.fileno())
    for each, name in ((clone, f"clone-{pool}"), (volume, f"source-{pool}")):
        driver.unpublish(each, name)
        driver.unstage(each)
    assert driver.image(volume, pools / pool).read_bytes()[:DATA_BYTES] == data
    assert driver.image(clone, pools / pool).read_bytes()[:DATA_BYTES] == bytes(MIB) + data[MIB:]
    driver.delete(clone)
    driver.delete(volume)


def test_a_volume_for_a_vm_is_staged_as_a_vhost_device_without_a_host_disk(driver: Driver) -> None:
    disks = set(os.listdir("/sys/block"))
    volume = driver.create("for-a-vm", 16, bus="vhost_vdpa")
    driver.stage(volume, block())
    target = driver.publish(volume, "vm", block())
    assert target.is_char_device()
    assert os.major(target.stat().st_rdev) == os.major(Path(_only_vhost_device()).stat().st_rdev)
    assert set(os.listdir("/sys/block")) == disks
    driver.unpublish(volume, "vm")
    driver.unstage(volume)
    driver.delete(volume)


def _only_vhost_device() -> str:
    (device,) = Path("/dev").glob("vhost-vdpa-*")
    return str(device)
