"""A registry in a directory: one JSON file for each volume and snapshot. For hosts without Kubernetes.

Layout below the state directory: `registry/volumes/ID.json`, `registry/snapshots/ID.json`. One process owns
the directory. Every write is serial, whole and durable (csi_vduse/records.py). An id that does not have our
form is unknown and never becomes a path.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_vduse import records
from csi_vduse.errors import NotFound, ResourceExhausted, Unavailable, VduseError
from csi_vduse.files import NO_SPACE
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool
from csi_vduse.volumes.ids import is_snapshot_id, is_volume_id
from csi_vduse.volumes.model import (
    Snapshot,
    Volume,
    snapshot_from_json,
    snapshot_to_json,
    volume_from_json,
    volume_to_json,
)


class DirectoryRegistry:
    """Registry below `state_dir`; see the Protocol Registry for the methods.

    Args:
        state_dir: survives a reboot; made if missing.
    """

    def __init__(self, state_dir: Path) -> None:
        self._volumes = state_dir / "registry" / "volumes"
        self._snapshots = state_dir / "registry" / "snapshots"
        self._threads = BlockingPool("registry", 2)
        self._write_lock = asyncio.Lock()

    async def get_volume(self, volume_id: str) -> Volume | None:
        """Return the volume, or None."""
        if not is_volume_id(volume_id):
            return None
        record = await self._call(records.read_record, self._volume_path(volume_id))
        return volume_from_json(record) if record is not None else None

    async def put_volume(self, volume: Volume) -> None:
        """Write the record, new or not."""
        async with self._write_lock:
            await self._call(records.write_record, self._volume_path(volume.id), volume_to_json(volume))

    async def update_volume(self, volume_id: str, change: Callable[[Volume], Volume]) -> Volume:
        """Replace the record by `change(record)` with nothing written in between.

        Raises:
            NotFound: no such volume.
        """
        async with self._write_lock:
            volume = await self.get_volume(volume_id)
            if volume is None:
                raise NotFound(f"volume {volume_id!r} does not exist")
            changed = change(volume)
            await self._call(records.write_record, self._volume_path(volume_id), volume_to_json(changed))
            return changed

    async def delete_volume(self, volume_id: str) -> None:
        """Remove the record; fine if there is none."""
        if is_volume_id(volume_id):
            async with self._write_lock:
                await self._call(records.delete_record, self._volume_path(volume_id))

    async def list_volumes(self) -> list[Volume]:
        """Return all volumes in whatever state, oldest first."""
        found = [volume_from_json(record) for record in await self._call(_read_all, self._volumes)]
        return sorted(found, key=lambda volume: (volume.created_at_ns, volume.id))

    async def get_snapshot(self, snapshot_id: str) -> Snapshot | None:
        """Return the snapshot, or None."""
        if not is_snapshot_id(snapshot_id):
            return None
        record = await self._call(records.read_record, self._snapshot_path(snapshot_id))
        return snapshot_from_json(record) if record is not None else None

    async def put_snapshot(self, snapshot: Snapshot) -> None:
        """Write the record, new or not."""
        async with self._write_lock:
            await self._call(
                records.write_record, self._snapshot_path(snapshot.id), snapshot_to_json(snapshot)
            )

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Remove the record; fine if there is none."""
        if is_snapshot_id(snapshot_id):
            async with self._write_lock:
                await self._call(records.delete_record, self._snapshot_path(snapshot_id))

    async def list_snapshots(self) -> list[Snapshot]:
        """Return all snapshots in whatever state, oldest first."""
        found = [snapshot_from_json(record) for record in await self._call(_read_all, self._snapshots)]
        return sorted(found, key=lambda snapshot: (snapshot.created_at_ns, snapshot.id))

    def close(self) -> None:
        """Stop the threads; the registry is not used afterwards."""
        self._threads.close()

    async def _call(self, function: Callable[..., Any], *args: object) -> Any:  # noqa: ANN401
        """Run one file operation in a thread, with OSError told in our words."""
        try:
            return await self._threads.run(DEFAULT_TIMEOUT_S, function, *args)
        except OSError as error:
            raise _registry_error(error) from error

    def _volume_path(self, volume_id: str) -> Path:
        return self._volumes / f"{volume_id}.json"

    def _snapshot_path(self, snapshot_id: str) -> Path:
        return self._snapshots / f"{snapshot_id}.json"


def _read_all(directory: Path) -> list[dict[str, Any]]:
    """Read every record of a directory; one that vanishes meanwhile is skipped."""
    found = (records.read_record(path) for path in records.list_records(directory))
    return [record for record in found if record is not None]


def _registry_error(error: OSError) -> VduseError:
    if error.errno in NO_SPACE:
        return ResourceExhausted(f"the state directory is full: {error}", hint="make room in --state-dir")
    return Unavailable(
        f"the registry cannot be read or written: {error}", hint="check --state-dir and its file system"
    )
