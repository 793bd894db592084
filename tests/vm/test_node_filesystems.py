"""File systems on real VDUSE disks through CSI: data survives, sizes grow, blocks are freed."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from tests.vm.csi import MIB, READER, Driver, Volume, block, mount
from tests.vm.exports import tool

# Smallest that the tools take, and somewhat more: every MiB is written in an emulated machine.
SIZES_MIB = {"ext4": (64, 128), "xfs": (304, 400), "btrfs": (160, 256)}
CHECKS = {
    "ext4": ("e2fsck", "-fn"),
    "xfs": ("xfs_repair", "-n"),
    "btrfs": ("btrfs", "check", "--readonly"),
}
each_file_system = pytest.mark.parametrize("fs", SIZES_MIB)


def write_tree(directory: Path) -> dict[str, str]:
    """Write files of odd sizes; return their checksums."""
    sums = {}
    for index, size_bytes in enumerate((0, 1, 4097, 3 * MIB + 5)):
        data = os.urandom(size_bytes)
        (directory / f"file {index}").write_bytes(data)
        sums[f"file {index}"] = hashlib.sha256(data).hexdigest()
    return sums


def read_tree(directory: Path) -> dict[str, str]:
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.iterdir()
        if path.is_file()
    }


def check_image(driver: Driver, volume: Volume, fs: str) -> None:
    """Run the file system's own checker on the image, while nobody uses it."""
    tool(*CHECKS[fs], driver.image(volume))


@each_file_system
def test_data_survives_unstage_and_the_file_system_is_clean(driver: Driver, fs: str) -> None:
    volume = driver.create(f"survives-{fs}", SIZES_MIB[fs][0])
    driver.stage(volume, mount(fs))
    sums = write_tree(driver.publish(volume, "pod", mount(fs)))
    driver.unpublish(volume, "pod")
    driver.unstage(volume)
    assert driver.leftovers() == []
    assert driver.record(volume)["filesystem"] == {"type": fs, "state": "formatted"}
    check_image(driver, volume, fs)
    staging = driver.stage(volume, mount(fs))
    assert read_tree(staging) == sums
    driver.unstage(volume)
    driver.delete(volume)


@each_file_system
def test_volume_grows_while_it_is_used(driver: Driver, fs: str) -> None:
    before_mib, after_mib = SIZES_MIB[fs]
    volume = driver.create(f"grows-{fs}", before_mib)
    driver.stage(volume, mount(fs))
    target = driver.publish(volume, "pod", mount(fs))
    sums = write_tree(target)
    before = driver.stats(volume, target).usage[0].total
    assert driver.expand(volume, target, after_mib) == after_mib * MIB
    after = driver.stats(volume, target).usage[0].total
    assert after - before > (after_mib - before_mib) * MIB * 9 // 10
    # The new space is really there: write more than the old size had left.
    (target / "big").write_bytes(os.urandom((after_mib - before_mib) * MIB // 2))
    assert {**read_tree(target), "big": ""} == {**sums, "big": ""}
    driver.unpublish(volume, "pod")
    driver.unstage(volume)
    check_image(driver, volume, fs)
    driver.delete(volume)


def test_raw_volume_grows_while_it_is_open(driver: Driver) -> None:
    volume = driver.create("grows-raw", 16)
    driver.stage(volume, block())
    target = driver.publish(volume, "raw", block())
    with target.open("r+b", buffering=0) as device:
        assert driver.expand(volume, target, 32) == 32 * MIB
        assert device.seek(0, os.SEEK_END) == 32 * MIB
        device.seek(31 * MIB)
        device.write(b"end" * 1024 * 512)
        os.fsync(device.fileno())
    assert driver.stats(volume, target).usage[0].total == 32 * MIB
    driver.unpublish(volume, "raw")
    driver.unstage(volume)
    with driver.image(volume).open("rb") as image:
        image.seek(31 * MIB)
        assert image.read(6) == b"endend"
    driver.delete(volume)


def test_read_only_mode_shows_the_data_and_changes_nothing(driver: Driver) -> None:
    volume = driver.create("reader", 64)
    sums = write_tree(driver.stage(volume, mount("ext4")))
    driver.unstage(volume)
    before = hashlib.sha256(driver.image(volume).read_bytes()).digest()
    staging = driver.stage(volume, mount("ext4", READER))
    assert read_tree(staging) == sums
    with pytest.raises(OSError, match="Read-only file system"):
        (staging / "more").write_text("x")
    driver.unstage(volume)
    assert hashlib.sha256(driver.image(volume).read_bytes()).digest() == before
    driver.delete(volume)


def test_fstrim_in_a_pod_frees_blocks_of_the_image(driver: Driver) -> None:
    volume = driver.create("trim", 128)
    driver.stage(volume, mount("ext4"))
    target = driver.publish(volume, "pod", mount("ext4"))
    (target / "big").write_bytes(os.urandom(48 * MIB))
    tool("sync", "-f", target)
    full_bytes = driver.image(volume).stat().st_blocks * 512
    (target / "big").unlink()
    tool("sync", "-f", target)
    tool("fstrim", target)
    assert driver.image(volume).stat().st_blocks * 512 < full_bytes - 40 * MIB
    driver.unpublish(volume, "pod")
    driver.unstage(volume)
    driver.delete(volume)


def test_xfs_clone_mounts_beside_its_source(driver: Driver) -> None:
    source = driver.create("xfs-source", 304)
    source_path = driver.stage(source, mount("xfs"))
    (source_path / "file").write_text("source")
    tool("sync", "-f", source_path)
    # Cloned while mounted: the clone's log is not clean, and its UUID is the source's.
    clone = driver.create("xfs-clone", 304, source)
    clone_path = driver.stage(clone, mount("xfs"))
    assert (clone_path / "file").read_text() == "source"
    (clone_path / "file").write_text("clone")
    assert (source_path / "file").read_text() == "source"
    for volume in (clone, source):
        driver.unstage(volume)
        check_image(driver, volume, "xfs")
        driver.delete(volume)


def test_file_system_of_a_fresh_volume_takes_little_of_the_pool(driver: Driver) -> None:
    volume = driver.create("thin", 1024)
    driver.stage(volume, mount("ext4"))
    driver.unstage(volume)
    assert driver.image(volume).stat().st_blocks * 512 < 48 * MIB
    driver.delete(volume)
