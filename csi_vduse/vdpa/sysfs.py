"""What the kernel says about VDUSE devices and the vDPA bus, read from sysfs, and who uses a disk.

Everything here is a short read (or an open that cannot wait) and never takes the vDPA bus lock, so it answers
while a netlink call hangs. Paths: /sys/class/vduse/NAME, /sys/bus/vdpa/devices/NAME (a symbolic link),
Documentation/ABI/testing/sysfs-bus-vdpa. The roots can be replaced, for tests.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.errors import FailedPrecondition
from csi_vduse.vdpa.disk_users import loops_over, mount_lines, mounts_anywhere, numbers_of
from csi_vduse.vdpa.model import Bus, BusDevice

_REMOTE_FILE_SYSTEMS = ("fuse", "nfs", "cifs", "smb", "ceph", "9p", "afs", "virtiofs", "glusterfs", "lustre")
_SECTOR_BYTES = 512  # of sysfs "size", whatever the block size


@dataclass(frozen=True)
class Roots:
    """Where the kernel's file systems are mounted."""

    sys: Path = Path("/sys")
    dev: Path = Path("/dev")
    proc: Path = Path("/proc")


@dataclass(frozen=True)
class Sysfs:
    """Read-only view of the kernel's VDUSE and vDPA state."""

    roots: Roots = Roots()

    @property
    def bus_dir(self) -> Path:
        """The vDPA bus."""
        return self.roots.sys / "bus/vdpa"

    def device_dir(self, name: str) -> Path:
        """The vDPA device of a VDUSE device; exists from DEV_NEW to DEV_DEL."""
        return self.bus_dir / "devices" / name

    def vduse_names(self) -> list[str]:
        """Names of all VDUSE devices of the machine, ours or not, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(
                entry.name for entry in (self.roots.sys / "class/vduse").iterdir() if entry.name != "control"
            )
        return []

    def vdpa_names(self) -> list[str]:
        """Names of all devices on the vDPA bus, sorted."""
        with contextlib.suppress(FileNotFoundError):
            return sorted(entry.name for entry in (self.bus_dir / "devices").iterdir())
        return []

    def vduse_exists(self, name: str) -> bool:
        """Whether a VDUSE device has this name."""
        return self.vduse_dir(name).exists()

    def vduse_dir(self, name: str) -> Path:
        """Where the kernel shows a VDUSE device."""
        return self.roots.sys / "class/vduse" / name

    def vdpa_exists(self, name: str) -> bool:
        """Whether the device is on the vDPA bus."""
        return self.device_dir(name).exists()

    def driver(self, name: str) -> str | None:
        """Name of the bus driver that the device is bound to, or None."""
        try:
            return (self.device_dir(name) / "driver").readlink().name
        except OSError:
            return None

    def is_held_by_driver(self, name: str) -> bool:
        """Whether a bus driver has the device, or has not let go of it yet.

        An unbind removes the link `driver` first and what the driver made of the device when that is done with
        (__device_release_driver in drivers/base/dd.c): in between it waits for the worker. Not seen is vhost_vdpa that
        waits for who has its character device open: it removes that first.
        """
        if self.driver(name) is not None:
            return True
        directory = self.device_dir(name)
        return any(next(directory.glob(made), None) for made in ("virtio[0-9]*", "vhost-vdpa-*"))

    def has_driver(self, bus: Bus) -> bool:
        """Whether the bus driver is loaded."""
        return (self.bus_dir / "drivers" / bus.value).exists()

    def find_disk(self, name: str) -> BusDevice | None:
        """The disk that virtio_vdpa made of the device, or None while there is none."""
        for block in sorted(self.device_dir(name).glob("virtio*/block/*")):
            device = self._numbers(block, block.name)
            if device:
                return device
        return None

    def find_vhost(self, name: str) -> BusDevice | None:
        """The character device that vhost_vdpa made of the device, or None while there is none."""
        for entry in sorted(self.device_dir(name).glob("vhost-vdpa-*")):
            device = self._numbers(entry, entry.name)
            if device:
                return device
        return None

    def find_interface(self, name: str) -> BusDevice | None:
        """The interface that virtio_vdpa made of the device; None while none is in our network namespace."""
        for interface in self.device_dir(name).glob("virtio*/net/*"):
            return BusDevice(self.roots.sys / "class/net" / interface.name)
        return None

    def find(self, name: str, bus: Bus) -> BusDevice | None:
        """What the bus driver made of the device."""
        if bus is Bus.VHOST:
            return self.find_vhost(name)
        return self.find_disk(name) or self.find_interface(name)

    def requests_in_flight(self, name: str) -> int | None:
        """Requests that the block layer waits for, or None if the device is no disk (block/stat.rst)."""
        for block in self.device_dir(name).glob("virtio*/block/*"):
            with contextlib.suppress(OSError, ValueError):
                return sum(int(part) for part in (block / "inflight").read_text().split())
        return None

    def disk_capacity_bytes(self, name: str) -> int | None:
        """What the block layer takes for the disk's size, or None if the device is no disk."""
        for block in self.device_dir(name).glob("virtio*/block/*"):
            with contextlib.suppress(OSError, ValueError):
                return int((block / "size").read_text()) * _SECTOR_BYTES
        return None

    def holders(self, name: str) -> list[str]:
        """Devices stacked on the disk or its partitions (device mapper, md, loop over it is not one)."""
        found: list[str] = []
        for block in self.device_dir(name).glob("virtio*/block/*"):
            for holders in (block / "holders", *block.glob(f"{block.name}*/holders")):
                with contextlib.suppress(OSError):
                    found += [entry.name for entry in holders.iterdir()]
        return sorted(found)

    def _disk_numbers(self, name: str) -> set[str]:
        """MAJOR:MINOR of the disk and of its partitions."""
        numbers: set[str] = set()
        for block in self.device_dir(name).glob("virtio*/block/*"):
            for file in (block / "dev", *block.glob(f"{block.name}*/dev")):
                with contextlib.suppress(OSError):
                    numbers.add(file.read_text().strip())
        return numbers

    def mount_points(self, name: str) -> list[str]:
        """Where a file system of the disk is mounted, in our mount namespace and the host's (pid 1)."""
        numbers = self._disk_numbers(name)
        device = self.find_disk(name)
        return sorted(
            {
                line.point
                for process in ("self", "1")
                for line in mount_lines(self.roots.proc / process / "mountinfo")
                if line.is_of(numbers, str(device.path) if device else "")
            }
        )

    def openers(self, device: BusDevice) -> list[str]:
        """Processes that hold the device open, as "PID (NAME)"; only those that we are allowed to see."""
        number = os.makedev(device.major, device.minor)
        is_disk = not device.path.name.startswith("vhost-vdpa-")
        found = []
        for process in self.roots.proc.iterdir():
            if (
                process.name.isdigit()
                and process.name != str(os.getpid())
                and _holds(process, number, is_disk=is_disk)
            ):
                with contextlib.suppress(OSError):
                    found.append(f"{process.name} ({(process / 'comm').read_text().strip()})")
        return found

    def claim_disk(self, device: BusDevice) -> int:
        """Open the disk exclusively: nobody can mount it or stack on it until the descriptor is closed.

        O_EXCL without O_CREAT on a block device is the kernel's claim (open(2)). A loop device over it is no obstacle to
        that, and must be looked for. Takes as long as reading every process's mount table, if the disk is in use.

        Raises:
            FailedPrecondition: it is in use; says by whom.
        """
        try:
            fd = os.open(device.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise FailedPrecondition(
                    f"{device.path} is in use: {self._claimant(device)}",
                    hint="unmount it and remove what is stacked on it first",
                ) from error
            raise
        loops = self._loops(device)
        if loops:
            os.close(fd)
            raise FailedPrecondition(
                f"{device.path} is used by {', '.join(loops)}",
                hint="detach these loop devices first: losetup -d",
            )
        return fd

    def _claimant(self, device: BusDevice) -> str:
        numbers = {f"{major}:{minor}" for major, minor in numbers_of(self.roots.sys, device)}
        if places := mounts_anywhere(self.roots.proc, numbers, str(device.path)):
            return f"mounted at {', '.join(places)}"
        if loops := self._loops(device):
            return ", ".join(loops)
        return "mounted, or claimed by another device"

    def _loops(self, device: BusDevice) -> list[str]:
        numbers = {os.makedev(major, minor) for major, minor in numbers_of(self.roots.sys, device)}
        return loops_over(self.roots.sys, self.roots.dev, path=str(device.path), numbers=numbers)

    def _numbers(self, directory: Path, name: str) -> BusDevice | None:
        try:
            text = (directory / "dev").read_text()
        except OSError:
            return None
        match = re.fullmatch(r"(\d+):(\d+)\s*", text)
        if not match:
            return None
        return BusDevice(self.roots.dev / name.replace("!", "/"), int(match[1]), int(match[2]))


def _holds(process: Path, number: int, *, is_disk: bool) -> bool:
    """Whether a process has a device node open.

    Files of file systems that ask others for a file's attributes are not looked at: one whose server is away would
    keep us waiting for ever, with everything else that the agent has to do.
    """
    wanted = stat.S_ISBLK if is_disk else stat.S_ISCHR
    remote: set[str] | None = None
    for fd in _descriptors(process):
        with contextlib.suppress(OSError):
            if not str(fd.readlink()).startswith("/"):
                continue
            remote = _remote_mounts(process) if remote is None else remote
            if remote and _mount_of(process, fd.name) in remote:
                continue
            status = fd.stat()
            if status.st_rdev == number and wanted(status.st_mode):
                return True
    return False


def _remote_mounts(process: Path) -> set[str]:
    """Ids of a process's mounts whose files cannot be looked at without asking somebody."""
    found = set()
    try:
        lines = (process / "mountinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        mount, _, source = line.partition(" - ")
        if source.startswith(_REMOTE_FILE_SYSTEMS):
            found.add(mount.split(" ", 1)[0])
    return found


def _mount_of(process: Path, fd: str) -> str:
    for line in (process / "fdinfo" / fd).read_text().splitlines():
        key, _, value = line.partition(":")
        if key == "mnt_id":
            return value.strip()
    return ""


def _descriptors(process: Path) -> Iterator[Path]:
    try:
        yield from (process / "fd").iterdir()
    except OSError:
        return
