"""How much of a pool is left: one pure function of what was measured and what was promised.

Volumes are thin, promises are not: what all volumes of a pool may come to occupy, beside the snapshots and
what others keep on the same storage, never exceeds what it holds. So a volume never meets a full pool because
of another volume of ours; only foreign files that grow can take its room.
"""

from __future__ import annotations

from collections.abc import Iterable

from csi_vduse.backends.base import PoolUsage
from csi_vduse.volumes.model import Snapshot, State, Volume


def available_bytes(
    usage: PoolUsage, *, pool: str, volumes: Iterable[Volume], snapshots: Iterable[Snapshot]
) -> int:
    """Return what may still be promised, in bytes; never negative.

    Args:
        usage: as measured now.
        pool: which pool it was measured on.
        volumes: all recorded volumes, in whatever state and pool.
        snapshots: all recorded snapshots; unfinished ones count with their full size.
    """
    promised = sum(volume.reserved_bytes for volume in volumes if volume.pool == pool)
    unfinished = sum(
        snapshot.size_bytes
        for snapshot in snapshots
        if snapshot.pool == pool and snapshot.state is State.CREATING
    )
    left = usage.total_bytes - usage.foreign_bytes - usage.snapshot_bytes - promised - unfinished
    return max(0, left)
