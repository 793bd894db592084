"""Copying an image file: sharing its blocks where the file system can, else moving only what is allocated.

Synchronous; runs in a thread. Keeps true: the destination ends with the source's content and holes, or an
error is raised; whether it is still wanted is looked at between chunks, so a copy ends at most one chunk late.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from pathlib import Path

from csi_vduse.backends.base import Copying
from csi_vduse.errors import DataLoss, DeadlineExceeded, Pending

# _IOW(0x94, 9, int), ioctl_ficlone(2).
_FICLONE = 0x40049409
_CHUNK_BYTES = 8 << 20
_BUFFER_BYTES = 1 << 20
_PROBE_BYTES = 4096
_STAT_BLOCK_BYTES = 512  # of st_blocks, stat(3type)
# What FICLONE and copy_file_range answer when the file system, or this pair of files, cannot.
_CANNOT = {errno.EOPNOTSUPP, errno.EXDEV, errno.EINVAL, errno.ENOTTY, errno.ENOSYS, errno.EPERM}


def copy_image(source_fd: int, target_fd: int, *, size_bytes: int, copying: Copying) -> None:
    """Make the empty file `target_fd` a copy of the first `size_bytes` of `source_fd`.

    Args:
        source_fd: readable; not written by anybody meanwhile.
        target_fd: writable and empty.
        size_bytes: length of the source that counts.
        copying: until when it is of use, and where it is told how far it is.

    Raises:
        DataLoss: the source is shorter than size_bytes.
        DeadlineExceeded: its time came first.
        Pending: nobody wants it any more.
        OSError: as the file system says.
    """
    if os.fstat(source_fd).st_size < size_bytes:
        raise _short(os.fstat(source_fd).st_size, size_bytes)
    os.fsync(source_fd)
    if not _reflink(source_fd, target_fd):
        os.ftruncate(target_fd, size_bytes)
        copying.total_bytes = min(os.fstat(source_fd).st_blocks * _STAT_BLOCK_BYTES, size_bytes)
        _copy_allocated(source_fd, target_fd, size_bytes, copying)
    _require_wanted(copying)


def can_share_blocks(directory: Path) -> bool:
    """Tell whether the file system of a directory shares blocks between files, by doing it with files without names."""
    flags = os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC
    try:
        with (
            os.fdopen(os.open(directory, flags, 0o600), "r+b", buffering=0) as source,
            os.fdopen(os.open(directory, flags, 0o600), "r+b", buffering=0) as target,
        ):
            source.write(bytes(_PROBE_BYTES))
            return _reflink(source.fileno(), target.fileno())
    except OSError as error:
        if error.errno in _CANNOT | {errno.EISDIR}:  # no files without names here
            return False
        raise


def _reflink(source_fd: int, target_fd: int) -> bool:
    try:
        fcntl.ioctl(target_fd, _FICLONE, source_fd)
    except OSError as error:
        if error.errno in _CANNOT:
            return False
        raise
    return True


def _copy_allocated(source_fd: int, target_fd: int, size_bytes: int, copying: Copying) -> None:
    offset = 0
    while offset < size_bytes:
        try:
            start = os.lseek(source_fd, offset, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:  # only a hole is left, lseek(2)
                return
            raise
        end = min(os.lseek(source_fd, start, os.SEEK_HOLE), size_bytes)
        offset = start
        while offset < end:
            _require_wanted(copying)
            moved = _copy_chunk(source_fd, target_fd, offset, min(end - offset, _CHUNK_BYTES))
            if moved == 0:
                raise _short(offset, size_bytes)
            offset += moved
            copying.copied_bytes += moved


def _copy_chunk(source_fd: int, target_fd: int, offset: int, length_bytes: int) -> int:
    """Copy up to `length_bytes` and return how many; 0 at the end of the source."""
    try:
        return os.copy_file_range(source_fd, target_fd, length_bytes, offset, offset)
    except OSError as error:
        if error.errno not in _CANNOT:
            raise
    data = os.pread(source_fd, min(length_bytes, _BUFFER_BYTES), offset)
    view = memoryview(data)
    written = 0
    while written < len(data):
        written += os.pwrite(target_fd, view[written:], offset + written)
    return len(data)


def _short(found_bytes: int, expected_bytes: int) -> DataLoss:
    return DataLoss(
        f"the source image ends at {found_bytes} bytes, it should have {expected_bytes}",
        hint="the file was truncated outside csi-vduse; restore it from a backup",
    )


def _require_wanted(copying: Copying) -> None:
    if copying.is_unwanted:
        raise Pending("nobody wants this copy any more", hint="retry")
    if time.monotonic() > copying.until_s:
        raise DeadlineExceeded(
            "the copy took longer than the volume could be held still",
            hint="detach the volume first, or use a pool on XFS or btrfs, where copies share blocks",
        )
