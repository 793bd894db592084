"""What a relay hands on: the driver's memory, its rings, and the log of what is in flight."""

from __future__ import annotations

import mmap
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from csi_vduse.dataplane.engine import QueueAddress, Region
from csi_vduse.dataplane.vhost_user.protocol import Inflight, MemoryRegion
from csi_vduse.errors import ProtocolError

_USED_INDEX: Final = struct.Struct("<H")
_USED_INDEX_AT: Final = 2  # of a used ring (VIRTIO 1.3, 2.7.8)


@dataclass(frozen=True)
class ServerLog:
    """The in-flight log that a server keeps: a file of the agent's, which stays the caller's, and where it is in it."""

    fd: int
    place: Inflight


@dataclass
class Ring:
    """A queue that the driver has; owns its descriptors.

    Args:
        index: its number.
        address: where it is.
        kick_fd: what the driver's kicks write to.
        call_fd: what the server writes to, to interrupt the driver.
        wanted: the server is to work on it.
        served: it does, as far as we know.
        drained: it stopped with nothing in flight.
        base: where it stopped.
    """

    index: int
    address: QueueAddress
    kick_fd: int
    call_fd: int
    wanted: bool
    served: bool = False
    drained: bool = True
    base: int = 0

    @classmethod
    def of(cls, index: int, address: QueueAddress) -> Ring:
        """Return a ring that nobody works on yet."""
        call_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        return cls(index, address, os.dup(address.kick_fd), call_fd, wanted=not address.paused)

    def close(self) -> None:
        """Close its descriptors."""
        os.close(self.kick_fd)
        os.close(self.call_fd)


@dataclass
class Memory:
    """The driver's memory, whose addresses are the same for descriptors and for rings; owns the descriptors."""

    regions: list[tuple[MemoryRegion, int]] = field(default_factory=list)

    @classmethod
    def of(cls, regions: Sequence[Region]) -> Memory:
        """Return memory with descriptors of its own."""
        return cls(
            [(MemoryRegion(r.iova, r.size_bytes, r.iova, r.offset_bytes), os.dup(r.fd)) for r in regions]
        )

    def close(self) -> None:
        """Let go of it."""
        for _, fd in self.regions:
            os.close(fd)
        self.regions.clear()

    def used_index(self, address: QueueAddress) -> int:
        """How many of a ring's requests have ended, as its driver sees it.

        Raises:
            ProtocolError: the ring is not in the driver's memory.
        """
        at = address.device_iova + _USED_INDEX_AT
        for region, fd in self.regions:
            if region.guest_address <= at < region.guest_address + region.size_bytes:
                offset = region.mmap_offset + at - region.guest_address
                page = offset // mmap.PAGESIZE * mmap.PAGESIZE
                with mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ, offset=page) as mapped:
                    return int(_USED_INDEX.unpack_from(mapped, offset - page)[0])
        raise ProtocolError(f"the used ring at {address.device_iova:#x} is not in the driver's memory")
