"""Where volumes and snapshots are recorded: the seam between the services and a directory or Kubernetes.

Every method is atomic and durable when it returns. `update_volume` is the only way to change a record that
others may change too: the node writes the file system record, the controller the capacity.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from csi_vduse.volumes.model import Snapshot, Volume


class Registry(Protocol):
    """Records of volumes and snapshots. Every method may raise Unavailable or DataLoss."""

    async def get_volume(self, volume_id: str) -> Volume | None:
        """Return the volume, or None; an id of another form than ours is simply unknown."""
        ...

    async def put_volume(self, volume: Volume) -> None:
        """Write the record, new or not."""
        ...

    async def update_volume(self, volume_id: str, change: Callable[[Volume], Volume]) -> Volume:
        """Replace the record by `change(record)` with nothing written in between; return the new one.

        Raises:
            NotFound: no such volume.
        """
        ...

    async def delete_volume(self, volume_id: str) -> None:
        """Remove the record; fine if there is none."""
        ...

    async def list_volumes(self) -> list[Volume]:
        """Return all volumes in whatever state, oldest first."""
        ...

    async def get_snapshot(self, snapshot_id: str) -> Snapshot | None:
        """Return the snapshot, or None."""
        ...

    async def put_snapshot(self, snapshot: Snapshot) -> None:
        """Write the record, new or not."""
        ...

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Remove the record; fine if there is none."""
        ...

    async def list_snapshots(self) -> list[Snapshot]:
        """Return all snapshots in whatever state, oldest first."""
        ...
