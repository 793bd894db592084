"""Ids of volumes and snapshots, derived from their names.

Deriving makes creation idempotent without a search, and needs no second record to be found again after a
crash. A volume id has exactly 20 bytes: the length of a virtio-blk serial (VIRTIO 1.3, 5.2.6), so that
`/dev/disk/by-id` and GET_ID carry the whole id.
"""

from __future__ import annotations

import hashlib
import re

VOLUME_PREFIX = "vol-"
SNAPSHOT_PREFIX = "snap-"
_DIGITS = 16
_VOLUME_ID = re.compile(r"vol-[0-9a-f]{16}")
_SNAPSHOT_ID = re.compile(r"snap-[0-9a-f]{16}")


def volume_id(name: str) -> str:
    """Return the id of the volume called `name`."""
    return VOLUME_PREFIX + _digest(name)


def snapshot_id(name: str) -> str:
    """Return the id of the snapshot called `name`."""
    return SNAPSHOT_PREFIX + _digest(name)


def is_volume_id(text: str) -> bool:
    """Tell whether `text` has the form of our volume ids; anything else cannot exist and is never a path."""
    return _VOLUME_ID.fullmatch(text) is not None


def is_snapshot_id(text: str) -> bool:
    """Tell whether `text` has the form of our snapshot ids."""
    return _SNAPSHOT_ID.fullmatch(text) is not None


def _digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()[:_DIGITS]
