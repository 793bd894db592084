"""The virtio-blk feature bits and configuration space that a device shows (VIRTIO 1.3, 5.2.3 and 5.2.4).

Pure functions of values: what is offered depends on nothing but their arguments.
"""

from __future__ import annotations

import struct
from typing import Final

SECTOR_BYTES: Final = 512  # of capacity and of every request, whatever the block size
BLOCK_SIZES: Final = (512, 1024, 2048, 4096)
MAX_DISCARD_SEGMENTS: Final = 32
MAX_DISCARD_SECTORS: Final = (1 << 31) // SECTOR_BYTES

F_SEG_MAX: Final = 1 << 2
F_RO: Final = 1 << 5
F_BLK_SIZE: Final = 1 << 6
F_FLUSH: Final = 1 << 9
F_TOPOLOGY: Final = 1 << 10
F_MQ: Final = 1 << 12
F_DISCARD: Final = 1 << 13
F_WRITE_ZEROES: Final = 1 << 14
F_INDIRECT_DESC: Final = 1 << 28
F_EVENT_IDX: Final = 1 << 29
F_VERSION_1: Final = 1 << 32
F_ACCESS_PLATFORM: Final = 1 << 33  # VDUSE refuses devices without it
F_RING_PACKED: Final = 1 << 34

# In order: capacity, size_max, seg_max, geometry, blk_size, four fields of topology, writeback, unused,
# num_queues, three fields of discard, two of write zeroes, may_unmap, unused.
_LAYOUT = struct.Struct("<QIIHBBIBBHIBBHIIIIIB3x")


def features(*, queues: int, read_only: bool, discard: bool, packed: bool = False) -> int:
    """Return the feature bits to offer.

    CONFIG_WCE is never among them: VDUSE refuses it (vduse_dev.c, features_is_valid).
    """
    bits = (
        F_SEG_MAX
        | F_BLK_SIZE
        | F_FLUSH
        | F_TOPOLOGY
        | F_INDIRECT_DESC
        | F_EVENT_IDX
        | F_VERSION_1
        | F_ACCESS_PLATFORM
    )
    if queues > 1:
        bits |= F_MQ
    if packed:
        bits |= F_RING_PACKED
    if read_only:
        return bits | F_RO
    return bits | F_DISCARD | F_WRITE_ZEROES if discard else bits


def encode(*, capacity_bytes: int, block_size_bytes: int, queues: int, queue_size: int) -> bytes:
    """Encode the configuration space.

    A request has header and status besides its data, so seg_max is queue_size - 2; size_max is not offered.
    """
    physical_block_exp = (4096 // block_size_bytes).bit_length() - 1
    return _LAYOUT.pack(
        capacity_bytes // SECTOR_BYTES,
        0,
        queue_size - 2,
        0,
        0,
        0,
        block_size_bytes,
        physical_block_exp,
        0,
        1,
        0,
        0,
        0,
        queues,
        MAX_DISCARD_SECTORS,
        MAX_DISCARD_SEGMENTS,
        max(4096, block_size_bytes) // SECTOR_BYTES,
        MAX_DISCARD_SECTORS,
        MAX_DISCARD_SEGMENTS,
        1,
    )


def encode_capacity(capacity_bytes: int) -> tuple[int, bytes]:
    """Return offset and bytes of the one field that changes in a device's life.

    It is written in one piece: VDUSE does not count configuration generations for a write of ours.
    """
    return 0, struct.pack("<Q", capacity_bytes // SECTOR_BYTES)
