"""What happens when a volume is created, expanded or deleted: look, decide, record, act, record.

Invariants, at every point where we may die:
- the record is there before the image and goes after it, so nothing exists without a record;
- a `creating` volume has never been answered to anybody: the next create discards it and starts over, or goes on
  with it, if it is what is asked for and its pool keeps copies (a change of who works throws no copy away);
- a `deleting` volume is finished by the next call for it, or by `reconcile` at the next start.
The caller holds the locks of the volume and of its source (locks.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import replace

from csi_vduse import log
from csi_vduse.backends.base import Backend
from csi_vduse.backends.pools import Pools
from csi_vduse.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from csi_vduse.services.agent_port import Attachments
from csi_vduse.services.copies import Copies, goes_on
from csi_vduse.services.planning import (
    grown_bytes,
    is_same_begun,
    mismatch,
    new_volume,
    require_same,
    require_source_in,
)
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.validation import CreateVolume, ExpandVolume
from csi_vduse.volumes.ids import volume_id as volume_id_of
from csi_vduse.volumes.model import Snapshot, SourceKind, State, Volume
from csi_vduse.volumes.parameters import parse_mutable
from csi_vduse.volumes.policy import Use, is_shared
from csi_vduse.volumes.registry import Registry
from csi_vduse.volumes.topology import Segments, satisfies


class Provisioner:
    """Creates, expands and deletes volumes.

    Args:
        registry: the records.
        pools: where images live.
        agent: tells what is in use.
        copies: fills volumes from others.
        reservations: guards the pools' room.
        segments: the place that volumes of these pools can be used from.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        pools: Pools,
        agent: Attachments,
        copies: Copies,
        reservations: Reservations,
        segments: Segments,
    ) -> None:
        self._registry = registry
        self._pools = pools
        self._agent = agent
        self._copies = copies
        self._reservations = reservations
        self._segments = segments

    async def ready_volume(self, volume_id: str) -> Volume:
        """Return a volume that was answered to a caller and is not going away.

        Raises:
            NotFound: there is none.
        """
        volume = await self._registry.get_volume(volume_id)
        if volume is None or volume.state is not State.READY:
            raise NotFound(f"volume {volume_id!r} does not exist")
        return volume

    async def create(self, request: CreateVolume) -> Volume:
        """Make a volume, or return the one that an equal request made.

        Raises:
            AlreadyExists: the name is taken by a volume that does not fit the request.
            NotFound: the source does not exist.
            InvalidArgument, OutOfRange: the request can never work.
            ResourceExhausted: no room, or the place that is asked for is not ours.
        """
        volume_id = volume_id_of(request.name)
        existing = await self._registry.get_volume(volume_id)
        if existing is not None and existing.name != request.name:
            raise AlreadyExists(
                f"name {request.name!r} has the id of {existing.name!r}", hint="choose another name"
            )
        if existing is not None and existing.state is State.READY:
            require_same(existing, request, default_pool=self._pools.default_name(), segments=self._segments)
            return existing
        volume, source = await self._begin(volume_id, request, existing)
        backend = self._pools.named(volume.pool)
        try:
            await self._fill(backend, volume, source)
            ready = replace(volume, state=State.READY)
            await self._registry.put_volume(ready)
        except BaseException as error:
            if source is None or not goes_on(backend, error):
                await self._discard_quietly(volume)
            raise
        return ready

    async def delete(self, volume_id: str) -> None:
        """Remove a volume; fine if there is none. Snapshots and clones of it are independent and stay.

        Raises:
            FailedPrecondition: it is attached or published.
            Unavailable: the agent does not answer, so we do not know.
        """
        volume = await self._registry.get_volume(volume_id)
        if volume is None:
            return
        for attachment in await self._agent.list():
            if attachment.volume_id == volume_id:
                raise FailedPrecondition(
                    f"volume {volume_id!r} is in use: device {attachment.device_name} is attached",
                    hint="unpublish and unstage it first",
                )
        nodes = await self._pools.holding(volume.pool).nodes_of(volume_id)
        if nodes:
            raise FailedPrecondition(
                f"volume {volume_id!r} is published at {', '.join(nodes)}", hint="unpublish it first"
            )
        await self._discard(volume)

    async def expand(self, request: ExpandVolume) -> Volume:
        """Grow a volume's image and record; the node tells the driver afterwards. Fine if large enough.

        Raises:
            NotFound: there is no such volume.
            OutOfRange: it is larger than the limit, and volumes do not shrink.
            ResourceExhausted: no room.
            DataLoss: the image is missing or truncated.
        """
        volume = await self.ready_volume(request.volume_id)
        capacity_bytes = grown_bytes(volume, request)
        if capacity_bytes == volume.capacity_bytes:
            return volume
        backend = self._pools.holding(volume.pool)
        await self._reservations.reserve(
            backend,
            capacity_bytes - volume.reserved_bytes,
            lambda: self._set_size(volume.id, volume.capacity_bytes, capacity_bytes),
        )
        async with AsyncExitStack() as undo:
            undo.push_async_callback(self._set_size, volume.id, volume.capacity_bytes, 0)
            await backend.expand(volume, capacity_bytes)
            grown = await self._set_size(volume.id, capacity_bytes, 0)
            undo.pop_all()
        return grown

    async def modify(self, volume_id: str, parameters: Mapping[str, str]) -> None:
        """Change a volume's mutable parameters; those that are not named stay.

        Raises:
            NotFound: there is no such volume.
            InvalidArgument: an unknown parameter or a bad value.
            Unavailable: recorded, but the agent does not answer; the next attach has it, and so has a retry.
        """
        volume = await self.ready_volume(volume_id)
        throttle = parse_mutable(parameters, volume.throttle)
        await self._registry.update_volume(volume_id, lambda found: replace(found, throttle=throttle))
        if volume_id in {attachment.volume_id for attachment in await self._agent.list()}:
            with contextlib.suppress(NotFound):  # detached meanwhile
                await self._agent.throttle(volume_id, throttle)

    def mismatch(self, volume: Volume, uses: tuple[Use, ...]) -> str:
        """Say why a volume cannot be used so, or nothing if it can."""
        return mismatch(volume, uses)

    async def _begin(
        self, volume_id: str, request: CreateVolume, existing: Volume | None
    ) -> tuple[Volume, Volume | Snapshot | None]:
        """Record what is to be made, or return the record of what was begun and can be gone on with."""
        try:
            volume, source = await self._plan(volume_id, request)
        except Unavailable:  # of a copy that may go on nobody knows better
            raise
        except VduseError:
            if existing is not None:
                await self._discard(existing)
            raise
        backend = self._pools.named(volume.pool)
        if existing is not None:
            if backend.keeps_copies and source is not None and is_same_begun(existing, volume):
                return existing, source
            await self._discard(existing)
        if await backend.has_volume(volume_id):
            raise FailedPrecondition(
                f"pool {volume.pool!r} holds an image of {volume_id} that no record knows of",
                hint="the state directory was lost or replaced; restore it, or move the image away",
            )
        await self._reservations.reserve(
            backend, volume.capacity_bytes, lambda: self._registry.put_volume(volume)
        )
        return volume, source

    async def _plan(self, volume_id: str, request: CreateVolume) -> tuple[Volume, Volume | Snapshot | None]:
        """Decide what the new volume is to be."""
        source = await self._source(request)
        pool = request.asked.pool or (source.pool if source else None) or self._pools.default_name()
        if pool is None:
            raise InvalidArgument(f"parameter pool is missing; allowed: {', '.join(self._pools.names)}")
        backend = self._pools.named(pool)
        if not is_shared(backend.kind) and not satisfies(request.requirement, self._segments):
            raise ResourceExhausted(
                f"a volume here can be used at {dict(self._segments)} only, which the request excludes",
                hint="file pools belong to one node; use volumeBindingMode: WaitForFirstConsumer",
            )
        require_source_in(source, pool)
        return new_volume(volume_id, request, source=source, pool=pool, backend=backend.kind), source

    async def _source(self, request: CreateVolume) -> Volume | Snapshot | None:
        if request.source is None:
            return None
        if request.source.kind is SourceKind.VOLUME:
            return await self.ready_volume(request.source.id)
        snapshot = await self._registry.get_snapshot(request.source.id)
        if snapshot is None or snapshot.state is State.DELETING:
            raise NotFound(f"snapshot {request.source.id!r} does not exist")
        if snapshot.state is State.CREATING:
            raise Unavailable(f"snapshot {snapshot.id!r} is not ready to use", hint="retry when it is")
        return snapshot

    async def _fill(self, backend: Backend, volume: Volume, source: Volume | Snapshot | None) -> None:
        match source:
            case None:
                await backend.create(volume)
            case Volume():
                await self._copies.of_volume(
                    backend,
                    source,
                    volume.id,
                    lambda copying: backend.clone(source, volume, copying=copying),
                )
            case Snapshot():
                await self._copies.of_snapshot(
                    backend,
                    source,
                    volume.id,
                    lambda copying: backend.restore(source, volume, copying=copying),
                )

    async def _set_size(self, volume_id: str, capacity_bytes: int, expanding_to_bytes: int) -> Volume:
        return await self._registry.update_volume(
            volume_id,
            lambda volume: replace(
                volume, capacity_bytes=capacity_bytes, expanding_to_bytes=expanding_to_bytes
            ),
        )

    async def _discard(self, volume: Volume) -> None:
        """Remove image and record, in the order that leaves no image without a record."""
        backend = self._pools.holding(volume.pool)
        if volume.state is not State.DELETING:
            await self._registry.put_volume(replace(volume, state=State.DELETING))
        await backend.delete_volume(volume.id)
        await self._registry.delete_volume(volume.id)

    async def _discard_quietly(self, volume: Volume) -> None:
        """Undo a failed create; if that fails too, the record stays and the next call goes on."""
        try:
            await self._discard(volume)
        except VduseError as error:
            log.get().warning(
                "an unfinished volume is left for the next try", volume_id=volume.id, error=str(error)
            )

    async def finish_delete(self, volume: Volume) -> None:
        """Go on with a delete that a restart interrupted."""
        await self._discard(volume)
