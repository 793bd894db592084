"""What the demo looks at besides the driver's answers: the kernel's view, and the bytes themselves.

What is kept true: nothing here changes anything but page caches and files of the demo's own.
"""

import hashlib
import mmap
import os
import re
from pathlib import Path

from lab.host import run

_EXTENT = re.compile(r"^ *\d+: +(\d+)\.\. *\d+: +(\d+)\.\. *\d+: +(\d+):(.*)$", re.MULTILINE)
_SECTOR_BYTES = 512  # small ext4 file systems have blocks of 1 KiB: filefrag would round to larger units
_VDPA = Path("/sys/bus/vdpa/devices")
_VDUSE = Path("/dev/vduse")


def disks() -> set[str]:
    """Names of the virtio disks that the host's block layer has."""
    return {path.name for path in Path("/sys/block").glob("vd*")}


def bus_driver(device: str) -> str:
    """The vDPA bus driver of a device."""
    return (_VDPA / device / "driver").resolve().name


def disk_driver(disk: Path) -> str:
    """The driver of a disk such as /dev/vda."""
    return Path("/sys/block", disk.name, "device", "driver").resolve().name


def serial(disk: Path) -> str:
    """A disk's serial number, which the kernel asked the worker for."""
    return Path("/sys/block", disk.name, "serial").read_text().strip()


def devices() -> list[str]:
    """Every VDUSE and vDPA device of this machine."""
    vduse = {path.name for path in _VDUSE.iterdir()} - {"control"}
    vdpa = {path.name for path in _VDPA.iterdir()}
    return sorted(vduse | vdpa)


def processes(word: str) -> list[str]:
    """Command lines of the processes that have a word in theirs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if word in line:
            found.append(line)
    return found


def mounts(below: Path) -> list[str]:
    """Mount points below a folder."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [line.split()[4] for line in lines if line.split()[4].startswith(str(below))]


def usage(path: Path) -> str:
    """What `df` says about a mount."""
    lines = run(["df", "--output=source,fstype,size,used,avail", "-h", str(path)], timeout_s=60)
    return " ".join(lines.splitlines()[1].split())


def size_bytes(path: Path) -> int:
    """Size of the file system that a path is on."""
    status = os.statvfs(path)
    return status.f_blocks * status.f_frsize


def write(path: Path, content: bytes) -> str:
    """Write a file and have it on the disk; its SHA-256."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    return hashlib.sha256(content).hexdigest()


def checksums(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, read from the disk and not from memory."""
    drop_caches()
    files = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def drop_caches() -> None:
    """Make the kernel forget what it has of files and disks, so that the next read is a request."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def extents(path: Path) -> list[tuple[int, int]]:
    """Where on the disk a file's blocks are: (offset, length) in bytes, in the file's order.

    Source: filefrag of e2fsprogs, which asks the file system with FIEMAP.
    """
    text = run(["filefrag", "-v", f"-b{_SECTOR_BYTES}", str(path)], timeout_s=60)
    return [
        (int(start) * _SECTOR_BYTES, int(count) * _SECTOR_BYTES)
        for _, start, count, _ in sorted(_EXTENT.findall(text), key=lambda found: int(found[0]))
    ]


def write_device(device: Path, offset_bytes: int, content: bytes) -> None:
    """Write to a block device past the page cache."""
    _direct(device, os.O_WRONLY, offset_bytes, content, len(content))


def read_device(device: Path, offset_bytes: int, length_bytes: int) -> bytes:
    """Read from a block device past the page cache."""
    return _direct(device, os.O_RDONLY, offset_bytes, b"", length_bytes)


def _direct(device: Path, flags: int, offset_bytes: int, content: bytes, length_bytes: int) -> bytes:
    fd = os.open(device, flags | os.O_DIRECT)
    try:
        with mmap.mmap(-1, length_bytes) as buffer:  # page-aligned, as O_DIRECT wants it
            if flags == os.O_WRONLY:
                buffer[:] = content
                moved = os.pwrite(fd, buffer, offset_bytes)
                os.fsync(fd)
            else:
                moved = os.preadv(fd, [buffer], offset_bytes)
            if moved != length_bytes:
                raise OSError(f"{device}: {moved} bytes of {length_bytes}")
            return bytes(buffer)
    finally:
        os.close(fd)
