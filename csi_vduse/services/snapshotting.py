"""What happens when a snapshot is created or deleted; the invariants are those of provisioning.py.

A snapshot is an independent copy (with shared blocks where the file system can); its volume may be deleted.
"""

from __future__ import annotations

import time
from dataclasses import replace

from csi_vduse import log
from csi_vduse.backends.pools import Pools
from csi_vduse.errors import AlreadyExists, NotFound, ResourceExhausted, Unavailable, VduseError
from csi_vduse.services.copies import Copies, goes_on
from csi_vduse.services.planning import is_same_begun
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.validation import CreateSnapshot
from csi_vduse.volumes.ids import snapshot_id as snapshot_id_of
from csi_vduse.volumes.model import Snapshot, State, Volume, record_of_copy
from csi_vduse.volumes.policy import is_shared
from csi_vduse.volumes.registry import Registry
from csi_vduse.volumes.topology import Segments, satisfies


class Snapshotter:
    """Creates and deletes snapshots.

    Args:
        registry: the records.
        pools: where images live.
        copies: cuts them.
        reservations: guards the pools' room.
        segments: the place that these pools are at.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        pools: Pools,
        copies: Copies,
        reservations: Reservations,
        segments: Segments,
    ) -> None:
        self._registry = registry
        self._pools = pools
        self._copies = copies
        self._reservations = reservations
        self._segments = segments

    async def create(self, request: CreateSnapshot) -> Snapshot:
        """Cut a snapshot, or return the one that an equal request made.

        Raises:
            AlreadyExists: the name is taken by a snapshot of another volume.
            NotFound: the volume does not exist.
            ResourceExhausted: no room, or the place that is asked for is not ours.
            FailedPrecondition: the volume is attached and could not be held still long enough.
        """
        snapshot_id = snapshot_id_of(request.name)
        existing = await self._registry.get_snapshot(snapshot_id)
        if existing is not None and existing.name != request.name:
            raise AlreadyExists(
                f"name {request.name!r} has the id of {existing.name!r}", hint="choose another name"
            )
        if existing is not None and existing.state is State.READY:
            if existing.source_volume_id != request.source_volume_id:
                raise AlreadyExists(
                    f"snapshot {request.name!r} exists and is of volume {existing.source_volume_id}",
                    hint="use another name, or delete it first",
                )
            return existing
        snapshot, volume = await self._begin(snapshot_id, request, existing)
        backend = self._pools.holding(volume.pool)
        try:
            cut_ns = await self._copies.of_volume(
                backend,
                volume,
                snapshot_id,
                lambda copying: backend.snapshot(volume, snapshot, copying=copying),
            )
            ready = replace(snapshot, state=State.READY, created_at_ns=cut_ns)
            await self._registry.put_snapshot(ready)
        except BaseException as error:
            if not goes_on(backend, error):
                await self._discard_quietly(snapshot)
            raise
        return ready

    async def _begin(
        self, snapshot_id: str, request: CreateSnapshot, existing: Snapshot | None
    ) -> tuple[Snapshot, Volume]:
        """Record what is to be cut, or return the record of what was begun and can be gone on with."""
        try:
            snapshot, volume = await self._plan(snapshot_id, request)
        except Unavailable:  # of a copy that may go on nobody knows better
            raise
        except VduseError:
            if existing is not None:
                await self._discard(existing)
            raise
        backend = self._pools.holding(volume.pool)
        if existing is not None:
            if backend.keeps_copies and is_same_begun(existing, snapshot):
                return existing, volume
            await self._discard(existing)
        await self._reservations.reserve(
            backend, await backend.allocated_bytes(volume), lambda: self._registry.put_snapshot(snapshot)
        )
        return snapshot, volume

    async def _plan(self, snapshot_id: str, request: CreateSnapshot) -> tuple[Snapshot, Volume]:
        """Decide what the new snapshot is to be."""
        volume = await self._registry.get_volume(request.source_volume_id)
        if volume is None or volume.state is not State.READY:
            raise NotFound(f"volume {request.source_volume_id!r} does not exist")
        if not is_shared(volume.backend) and not satisfies(request.requirement, self._segments):
            raise ResourceExhausted(
                f"a snapshot here can be used at {dict(self._segments)} only, which the request excludes"
            )
        snapshot = Snapshot(
            id=snapshot_id,
            name=request.name,
            source_volume_id=volume.id,
            pool=volume.pool,
            size_bytes=volume.capacity_bytes,
            created_at_ns=time.time_ns(),
            state=State.CREATING,
            filesystem=record_of_copy(volume.filesystem),
            block_size_bytes=volume.parameters.block_size_bytes,
        )
        return snapshot, volume

    async def delete(self, snapshot_id: str) -> None:
        """Remove a snapshot; fine if there is none. Volumes restored from it stay."""
        snapshot = await self._registry.get_snapshot(snapshot_id)
        if snapshot is not None:
            await self._discard(snapshot)

    async def _discard(self, snapshot: Snapshot) -> None:
        """Remove image and record, in the order that leaves no image without a record."""
        backend = self._pools.holding(snapshot.pool)
        if snapshot.state is not State.DELETING:
            await self._registry.put_snapshot(replace(snapshot, state=State.DELETING))
        await backend.delete_snapshot(snapshot.id)
        await self._registry.delete_snapshot(snapshot.id)

    async def _discard_quietly(self, snapshot: Snapshot) -> None:
        """Undo a failed create; if that fails too, the record stays and the next call goes on."""
        try:
            await self._discard(snapshot)
        except VduseError as error:
            log.get().warning(
                "an unfinished snapshot is left for the next try", snapshot_id=snapshot.id, error=str(error)
            )
