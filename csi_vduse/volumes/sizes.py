"""How large a volume becomes: pure arithmetic on what was asked.

Capacities are multiples of GRANULE_BYTES, which is a multiple of every block size that we offer, so that a
volume can be cloned to one with another block size and its last block is never partial.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from csi_vduse.errors import OutOfRange

GRANULE_BYTES = 4096
MIN_BYTES = 1 << 20
DEFAULT_BYTES = 1 << 30
# Largest file offset of Linux (loff_t), rounded down.
MAX_BYTES = (1 << 63) - GRANULE_BYTES

# Smallest device that the tools will format: mkfs.xfs refuses below 300 MiB (xfsprogs 5.19 and later),
# mkfs.btrfs below 109 MiB (114294784 bytes, btrfs-progs 6.x). ext4 works from 1 MiB on.
_FILESYSTEM_MIN_BYTES = {"ext4": MIN_BYTES, "xfs": 300 << 20, "btrfs": 128 << 20}


@dataclass(frozen=True)
class CapacityRange:
    """Sizes that the caller accepts, in bytes; 0 leaves that end open."""

    required_bytes: int = 0
    limit_bytes: int = 0

    def allows(self, capacity_bytes: int) -> bool:
        """Tell whether a volume of this size is one that was asked for."""
        return self.required_bytes <= capacity_bytes and (
            self.limit_bytes == 0 or capacity_bytes <= self.limit_bytes
        )


def round_up(size_bytes: int) -> int:
    """Return the next multiple of GRANULE_BYTES."""
    return -(-size_bytes // GRANULE_BYTES) * GRANULE_BYTES


def floor_bytes(filesystems: Iterable[str | None]) -> int:
    """Return the smallest capacity that every one of these file systems (None: raw block) can live in."""
    return max((_FILESYSTEM_MIN_BYTES.get(name or "", MIN_BYTES) for name in filesystems), default=MIN_BYTES)


def choose(wanted: CapacityRange, *, smallest_bytes: int, default_bytes: int) -> int:
    """Return the capacity for a new volume: the least that meets everything.

    Args:
        wanted: the caller's range.
        smallest_bytes: what the file system or the source needs.
        default_bytes: used when the caller requires nothing; a limit below it wins.

    Raises:
        OutOfRange: no size is at once large enough and within the limit.
    """
    aim_bytes = wanted.required_bytes
    if aim_bytes == 0:
        aim_bytes = min(default_bytes, wanted.limit_bytes or default_bytes)
        if wanted.limit_bytes:
            aim_bytes = aim_bytes // GRANULE_BYTES * GRANULE_BYTES
    capacity_bytes = round_up(max(aim_bytes, smallest_bytes))
    if capacity_bytes > MAX_BYTES:
        raise OutOfRange(
            f"{wanted.required_bytes} bytes are more than a volume can have", hint=f"at most {MAX_BYTES}"
        )
    if wanted.limit_bytes and capacity_bytes > wanted.limit_bytes:
        raise OutOfRange(
            f"the smallest possible volume has {capacity_bytes} bytes, the limit is {wanted.limit_bytes}",
            hint=f"sizes are multiples of {GRANULE_BYTES}; this volume needs {smallest_bytes} or more",
        )
    return capacity_bytes
