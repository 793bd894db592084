"""Who has a disk without a descriptor that can be seen: mounts in other mount namespaces, and loop devices.

The kernel itself holds the files of both. Looks only, and reads what may block (every process's mount table, a loop
device's status): call it where that may last, in a thread.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.vdpa.model import BusDevice

# linux/loop.h: LOOP_GET_STATUS64, struct loop_info64; its third field is the device number of the file below, if that
# is a device node.
_LOOP_GET_STATUS64 = 0x4C05
_LOOP_INFO64_BYTES = 232
_LOOP_INFO64_HEAD = struct.Struct("=QQQ")


def numbers_of(sys: Path, disk: BusDevice) -> frozenset[tuple[int, int]]:
    """Return the numbers (major, minor) of a disk and of its partitions."""
    found = {(disk.major, disk.minor)}
    for file in (sys / "dev/block" / f"{disk.major}:{disk.minor}").glob(f"{disk.path.name}*/dev"):
        with contextlib.suppress(OSError, ValueError):
            major, minor = file.read_text().split(":")
            found.add((int(major), int(minor)))
    return frozenset(found)


@dataclass(frozen=True)
class MountLine:
    """What a mount table says of one mount, as far as it tells whose disk it is of (proc_pid_mountinfo(5))."""

    device: str
    point: str
    fs_type: str
    source: str

    def is_of(self, numbers: Collection[str], path: str) -> bool:
        """Tell whether it is of a disk. btrfs gives its mounts a number that is no disk's, and names its disk instead.

        Args:
            numbers: MAJOR:MINOR of the disk and its partitions.
            path: of the disk, such as /dev/vdb.
        """
        return self.device in numbers or (self.fs_type == "btrfs" and self.source == path)


def mount_lines(mountinfo: Path) -> Iterator[MountLine]:
    """Read a mount table; nothing if it cannot be read."""
    with contextlib.suppress(OSError):
        for line in mountinfo.read_text(errors="surrogateescape").splitlines():
            mount, _, of = line.partition(" - ")
            mount_fields, of_fields = mount.split(" "), of.split(" ")
            if len(mount_fields) > 5 and len(of_fields) > 1:
                yield MountLine(mount_fields[2], mount_fields[4], of_fields[0], of_fields[1])


def mounts_anywhere(proc: Path, numbers: Collection[str], path: str) -> list[str]:
    """Return where a disk is mounted, in whichever mount namespace, as "POINT in the mount namespace of PID (NAME)".

    One process of each namespace is named, the oldest; only those that we may look at.
    """
    namespaces: set[str] = set()
    found = []
    for process in sorted(
        (each for each in proc.iterdir() if each.name.isdigit()), key=lambda p: int(p.name)
    ):
        with contextlib.suppress(OSError):
            namespace = str((process / "ns/mnt").readlink())
            if namespace in namespaces:
                continue
            namespaces.add(namespace)
            who = f"{process.name} ({(process / 'comm').read_text().strip()})"
            found += [
                f"{line.point} in the mount namespace of {who}"
                for line in mount_lines(process / "mountinfo")
                if line.is_of(numbers, path)
            ]
    return found


def loops_over(sys: Path, dev: Path, *, path: str, numbers: Collection[int] = ()) -> list[str]:
    """Return the loop devices over a file, over anything below a directory, or over a device by whatever name.

    Args:
        sys: where sysfs is.
        dev: where device nodes are.
        path: of the file, the directory, or the device node.
        numbers: of the device and its partitions (st_rdev), if it is one.
    """
    found = []
    for backing_file in sorted(sys.glob("block/loop*/loop/backing_file")):
        name = backing_file.parent.parent.name
        with contextlib.suppress(OSError):
            backing = backing_file.read_text().rstrip("\n")
            by_name = backing == path or backing.startswith(path.rstrip("/") + "/")
            if by_name or (numbers and _device_below(dev / name) in numbers):
                found.append(name)
    return found


def _device_below(loop: Path) -> int | None:
    """Return the number of the device that a loop device lies over; None if it lies over something else."""
    try:
        fd = os.open(loop, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError:
        return None
    try:
        status = fcntl.ioctl(fd, _LOOP_GET_STATUS64, bytes(_LOOP_INFO64_BYTES))
    except OSError:
        return None
    finally:
        os.close(fd)
    _device, _inode, below = _LOOP_INFO64_HEAD.unpack_from(status)
    return below or None
