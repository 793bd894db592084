"""Who has a disk, beyond what descriptors and our own mount table show: told by name, on loop devices."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_vduse.errors import FailedPrecondition
from csi_vduse.vdpa.disk_users import numbers_of
from csi_vduse.vdpa.model import BusDevice
from csi_vduse.vdpa.sysfs import Roots, Sysfs
from tests.unit.namespaces import elsewhere
from tests.unit.node.loop_agent import detach_loop, loop_works, losetup

pytestmark = pytest.mark.skipif(not loop_works(), reason="no loop devices here (needs root)")
SIZES_MIB = {"ext4": 16, "btrfs": 128}


@contextlib.contextmanager
def loop_over(path: Path | str) -> Iterator[BusDevice]:
    name = losetup("--find", "--show", str(path))
    try:
        number = Path(name).stat().st_rdev
        yield BusDevice(Path(name), os.major(number), os.minor(number))
    finally:
        detach_loop(name)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(128 << 20)
    return path


def claim(disk: BusDevice) -> None:
    os.close(Sysfs().claim_disk(disk))


@pytest.mark.parametrize("fs", SIZES_MIB)
def test_a_mount_that_only_another_process_sees_is_told_with_the_process(
    image: Path, tmp_path: Path, fs: str
) -> None:
    subprocess.run([f"mkfs.{fs}", "-q", image], check=True)
    place = tmp_path / "place"
    place.mkdir()
    with loop_over(image) as disk:
        claim(disk)
        with (
            elsewhere(f"mount {disk.path} {place}") as process,
            pytest.raises(FailedPrecondition, match=rf"{place} in the mount namespace of {process.pid} \("),
        ):
            claim(disk)
        claim(disk)


def test_a_loop_device_over_a_disk_is_named(image: Path) -> None:
    """The kernel holds its file: it is in no process's descriptors, and is no exclusive opener."""
    with loop_over(image) as disk:
        with (
            loop_over(disk.path) as loop,
            pytest.raises(FailedPrecondition, match=f"used by {loop.path.name}"),
        ):
            claim(disk)
        claim(disk)


def test_a_loop_device_over_another_name_of_a_disk_is_named(image: Path, tmp_path: Path) -> None:
    with loop_over(image) as disk:
        other = tmp_path / "node"
        os.mknod(other, 0o60600, os.makedev(disk.major, disk.minor))
        with loop_over(other) as loop, pytest.raises(FailedPrecondition, match=f"used by {loop.path.name}"):
            claim(disk)


def test_users_of_a_partition_are_users_of_its_disk(tmp_path: Path) -> None:
    disk = tmp_path / "dev/block/254:16"
    (disk / "vdb1").mkdir(parents=True)
    (disk / "vdb1/dev").write_text("254:17\n")
    (disk / "queue").mkdir()
    assert numbers_of(tmp_path, BusDevice(Path("/dev/vdb"), 254, 16)) == {(254, 16), (254, 17)}


def test_btrfs_is_seen_where_it_is_mounted(image: Path, tmp_path: Path) -> None:
    """Its mounts carry another device number than its disk."""
    sys = tmp_path / "sys"
    block = sys / "bus/vdpa/devices/v/virtio0/block/vdz"
    block.mkdir(parents=True)
    (block / "dev").write_text("254:0\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/mountinfo").write_text(
        "40 35 0:50 /sub /mnt/b rw - btrfs /dev/vdz rw\n41 35 0:51 / /other rw - btrfs /dev/sda1 rw\n"
    )
    del image
    assert Sysfs(Roots(sys=sys, proc=tmp_path / "proc")).mount_points("v") == ["/mnt/b"]
