"""The in-flight log: a shared file that the front-end keeps, so that a server that comes after us can go on.

We make the file (GET_INFLIGHT_FD) or get back the one that a server before us made (SET_INFLIGHT_FD); the engine
writes to it. What is in it is the protocol's own layout, described in src/inflight.h.

Kept true: the file cannot shrink under the mapping (it is sealed, or root's or our own and nobody else's, or refused),
and a mapping that abandoned requests may still be noted in is never taken away.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
import struct
from dataclasses import replace
from typing import Final

from csi_vduse.dataplane.engine import inflight_bytes
from csi_vduse.dataplane.vhost_user.protocol import MAX_QUEUE_SIZE, Inflight
from csi_vduse.errors import ProtocolError

# A queue's part has a head and an entry for each descriptor, of 16 bytes each if the ring is split and of 32 if it is
# packed. In the head: the version, 0 if nobody has used it yet, and the number of entries.
_HEAD: Final = struct.Struct("=8xHH")


class InflightLog:
    """A mapped log; the file itself may be closed.

    Args:
        fd: of the file.
        inflight: where in it the log is, and for which queues.
        packed: whether the rings are.
        max_queues: more than this are refused.

    Raises:
        ProtocolError: it cannot be the log of such queues.
    """

    def __init__(self, fd: int, inflight: Inflight, *, packed: bool, max_queues: int) -> None:
        _check(inflight, max_queues)
        part_bytes = inflight_bytes(inflight.queue_size, packed=packed)
        if inflight.mmap_size < part_bytes * inflight.queues or inflight.mmap_offset % mmap.PAGESIZE:
            raise ProtocolError(
                f"an in-flight log of {inflight.mmap_size} bytes at {inflight.mmap_offset}",
                hint=f"{inflight.queues} queues of {inflight.queue_size} entries need {part_bytes} bytes each",
            )
        if os.fstat(fd).st_size < inflight.mmap_offset + inflight.mmap_size:
            raise ProtocolError("the file of the in-flight log is too short")
        status = os.fstat(fd)
        if not _seals(fd) & fcntl.F_SEAL_SHRINK and not _is_ours(status):
            raise ProtocolError("the file of the in-flight log is not sealed against shrinking")
        self._identity = (status.st_dev, status.st_ino, inflight)
        self._queues = inflight.queues
        self._part_bytes = part_bytes
        self._map = mmap.mmap(fd, inflight.mmap_size, offset=inflight.mmap_offset)

    def is_same(self, other: InflightLog) -> bool:
        """Whether both are the same part of the same file."""
        return self._identity == other._identity

    def part(self, index: int) -> memoryview | None:
        """Return a queue's part, None if there is none for it."""
        if index >= self._queues:
            return None
        return memoryview(self._map)[index * self._part_bytes : (index + 1) * self._part_bytes]

    def keep(self) -> None:
        """Keep the mapping until the process ends: requests that were abandoned are still noted in it."""
        _kept.append(self)


_kept: list[InflightLog] = []


def is_begun(part: memoryview) -> bool:
    """Whether a server has served a queue with this part of the log."""
    return bool(_HEAD.unpack_from(part)[0])


def count(part: memoryview, *, packed: bool) -> int:
    """Return how many requests a part says are in flight; for people, nothing relies on it."""
    entry_bytes = 32 if packed else 16
    _, entries = _HEAD.unpack_from(part)
    return sum(1 for flag in part[entry_bytes : entry_bytes * (entries + 1) : entry_bytes] if flag)


def create(asked: Inflight, *, packed: bool, max_queues: int) -> tuple[int, Inflight]:
    """Make the file of a log; return its descriptor and its description.

    Raises:
        ProtocolError: nobody can have such queues.
    """
    _check(asked, max_queues)
    size = inflight_bytes(asked.queue_size, packed=packed) * asked.queues
    fd = os.memfd_create("vhost-user-inflight", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
    return fd, replace(asked, mmap_size=size, mmap_offset=0)


def _check(inflight: Inflight, max_queues: int) -> None:
    if not 0 < inflight.queues <= max_queues or not 0 < inflight.queue_size <= MAX_QUEUE_SIZE:
        raise ProtocolError(f"an in-flight log for {inflight.queues} queues of {inflight.queue_size} entries")


def _is_ours(status: os.stat_result) -> bool:
    """Whether only root, or who could do anything to us, can open the file to shrink it: a log on tmpfs, as our own."""
    return status.st_uid in {0, os.geteuid()} and not status.st_mode & (stat.S_IRWXG | stat.S_IRWXO)


def _seals(fd: int) -> int:
    try:
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS)
    except OSError:
        return 0  # no memfd
