"""Volumes and snapshots of a cluster's pools: what is wanted is written to the API, and the pool's node does it.

For pools that are on no node the leading controller is the node.

Invariants:
- an object is made with a finalizer before anything else, so nothing exists on a node without it;
- one call may end before the node has finished (DEADLINE_EXCEEDED): the next finds the object and waits on;
- what a node says cannot be done is answered once, with the node's error, and the object is deleted: the
  next try starts over, perhaps on another node.
Any number of controllers may run this at once: every write is of the version that was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import suppress

from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Pending,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import SNAPSHOTS, VOLUMES, Object, is_going
from csi_vduse.services.nodes_view import NodesView, default_pool
from csi_vduse.services.planning import (
    grown_bytes,
    mismatch,
    new_volume,
    require_same,
    require_source_in,
)
from csi_vduse.services.validation import CreateSnapshot, CreateVolume, ExpandVolume
from csi_vduse.services.waiting import WAIT_S, wait_gone, wait_settled
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.ids import is_snapshot_id, is_volume_id
from csi_vduse.volumes.ids import snapshot_id as snapshot_id_of
from csi_vduse.volumes.ids import volume_id as volume_id_of
from csi_vduse.volumes.model import Snapshot, SourceKind, State, Volume
from csi_vduse.volumes.parameters import parse_mutable
from csi_vduse.volumes.policy import Use
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry
from csi_vduse.volumes.topology import node_segments, satisfies

_THROTTLE_WAIT_S = 20.0
_DETACH_WAIT_S = 8.0


class RemoteProvisioner:
    """Volumes; see services/operations.py.

    Args:
        api: where the objects are.
        registry: reads and writes them; without a node.
        volumes: a mirror of all of them, to wait with.
        view: the nodes' pools.
    """

    def __init__(
        self, *, api: ApiServer, registry: KubernetesRegistry, volumes: Mirror, view: NodesView
    ) -> None:
        self._api = api
        self._registry = registry
        self._volumes = volumes
        self._view = view

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
        """Have a volume made, or return the one that an equal request made.

        Raises:
            AlreadyExists: the name is taken by a volume that does not fit the request.
            Pending: an earlier volume of that name is on its way out.
            DeadlineExceeded: the node has not finished; the next call waits on.
            VduseError: what the node says.
        """
        volume_id = volume_id_of(request.name)
        found = await self._api.get(VOLUMES, volume_id)
        if found is None:
            await self._api.create(VOLUMES, objects.volume_object(await self._plan(volume_id, request)))
        else:
            await self._require_continuable(found, request)
        found = await self._settled(volume_id)
        if is_going(found):
            raise _being_deleted(volume_id)
        if objects.has_state(found, objects.FAILED):
            await self._api.delete(VOLUMES, volume_id)
            raise objects.error_from_status(found) or VduseError(f"volume {volume_id} could not be made")
        volume = objects.volume_from_object(found)
        if volume is None:
            raise Pending(f"volume {volume_id} has changed", hint="retry")
        return volume

    async def delete(self, volume_id: str) -> None:
        """Have a volume removed; fine if there is none.

        Raises:
            FailedPrecondition: it is attached.
            DeadlineExceeded: its node has not removed it yet; the next call waits on.
        """
        found = await self._api.get(VOLUMES, volume_id) if is_volume_id(volume_id) else None
        if found is None:
            return
        if _attachment(found):
            with suppress(DeadlineExceeded):  # detached just now, perhaps, and its node has not said so yet
                found = await self._volumes.wait_for(
                    volume_id, lambda now: not _attachment(now), timeout_s=_DETACH_WAIT_S, what="its detach"
                )
        attachment = _attachment(found)
        if attachment:
            raise FailedPrecondition(
                f"volume {volume_id!r} is in use on {attachment.get('node')} ({attachment.get('state')})",
                hint="unpublish and unstage it first",
            )
        await self._api.delete(VOLUMES, volume_id)
        await wait_gone(self._api, self._volumes, VOLUMES, volume_id)

    async def expand(self, request: ExpandVolume) -> Volume:
        """Have a volume's image grown; fine if it is large enough.

        Raises:
            NotFound: there is no such volume.
            OutOfRange: it is larger than the limit, and volumes do not shrink.
            DeadlineExceeded: the node has not finished; the next call waits on.
            VduseError: what the node says; the volume keeps its size.
        """
        volume = await self.ready_volume(request.volume_id)
        wanted_bytes = grown_bytes(volume, request)
        if wanted_bytes == volume.capacity_bytes:
            return volume
        found = await self._set_capacity(volume.id, wanted_bytes)
        found = await self._done(
            volume.id,
            found,
            lambda now: int(now["status"].get("capacityBytes", 0)) >= wanted_bytes,
            f"growing volume {volume.id} to {wanted_bytes} bytes",
        )
        error = objects.error_from_status(found)
        grown = objects.volume_from_object(found)
        if grown is None:
            raise NotFound(f"volume {volume.id!r} does not exist")
        if error is not None and grown.capacity_bytes < wanted_bytes:
            await self._set_capacity(volume.id, grown.capacity_bytes)
            raise error
        return grown

    async def modify(self, volume_id: str, parameters: Mapping[str, str]) -> None:
        """Change a volume's mutable parameters; those that are not named stay.

        Raises:
            NotFound: there is no such volume.
            InvalidArgument: an unknown parameter or a bad value.
            Unavailable: recorded, but its node has not taken it up yet; the next attach has it, and so has a retry.
        """
        volume = await self.ready_volume(volume_id)
        throttle = objects.throttle_spec(parse_mutable(parameters, volume.throttle))
        found = await self._registry.update_spec(
            VOLUMES, volume_id, lambda now: {**now["spec"], "throttle": throttle}
        )
        try:
            found = await self._done(
                volume_id, found, lambda _: False, "the change of limits", timeout_s=_THROTTLE_WAIT_S
            )
        except DeadlineExceeded as error:
            raise Unavailable(
                f"the limits of volume {volume_id} are recorded, but node {volume.node} has not taken them up",
                hint="retry; the next attach has them",
            ) from error
        wrong = objects.error_from_status(found)
        if wrong is not None:
            raise wrong

    def mismatch(self, volume: Volume, uses: tuple[Use, ...]) -> str:
        """Say why a volume cannot be used so, or nothing if it can."""
        return mismatch(volume, uses)

    async def _plan(self, volume_id: str, request: CreateVolume) -> Volume:
        """Decide what the new volume is to be and where."""
        await self._volumes.wait_synced()
        source = await self._source(request)
        pools = await self._view.pools()
        pool = request.asked.pool or (source.pool if source else None) or default_pool(pools)
        if pool is None:
            known = ", ".join(sorted({each.pool for each in pools}))
            raise InvalidArgument(f"parameter pool is missing; allowed: {known or 'none yet'}")
        require_source_in(source, pool)
        kind = next((each.kind for each in pools if each.pool == pool), "")
        volume = new_volume(volume_id, request, source=source, pool=pool, backend=kind or "file")
        place = self._view.choose(
            pools,
            request.requirement,
            pool=pool,
            need_bytes=volume.capacity_bytes,
            node=source.node if source else None,
        )
        return new_volume(volume_id, request, source=source, pool=pool, backend=place.kind, node=place.node)

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

    async def _require_continuable(self, found: Object, request: CreateVolume) -> None:
        """Refuse an object of the name that is not what is asked for; one that was never answered may go."""
        wanted = objects.wanted_volume(found)
        if wanted.name != request.name:
            raise AlreadyExists(
                f"name {request.name!r} has the id of {wanted.name!r}", hint="choose another name"
            )
        if is_going(found):
            raise _being_deleted(wanted.id)
        existing = objects.volume_from_object(found)
        is_ready = existing is not None and existing.state is State.READY
        try:
            require_same(
                existing if existing is not None and is_ready else wanted,
                request,
                default_pool=default_pool(await self._view.pools()),
                segments=node_segments(wanted.node),
            )
        except AlreadyExists as error:
            if is_ready:
                raise
            await self._api.delete(VOLUMES, wanted.id)
            raise Pending(f"an unfinished volume {wanted.id} makes way", hint="retry") from error

    async def _settled(self, volume_id: str) -> Object:
        """Wait until the node has made a volume, or says that it cannot."""
        return await wait_settled(self._volumes, volume_id, f"making volume {volume_id}")

    async def _set_capacity(self, volume_id: str, capacity_bytes: int) -> Object:
        return await self._registry.update_spec(
            VOLUMES, volume_id, lambda now: {**now["spec"], "capacityBytes": capacity_bytes}
        )

    async def _done(
        self,
        volume_id: str,
        written: Object,
        done: Callable[[Object], bool],
        what: str,
        timeout_s: float = WAIT_S,
    ) -> Object:
        """Wait until the node has met the spec that was written, or says that it cannot."""
        generation = written["metadata"]["generation"]

        def met(now: Object | None) -> bool:
            if now is None or "status" not in now or now["metadata"]["generation"] < generation:
                return False
            seen = now["status"].get("observedGeneration", 0)
            return seen >= generation or done(now) or objects.error_from_status(now) is not None

        found = await self._volumes.wait_for(volume_id, met, timeout_s=timeout_s, what=what)
        if found is None:
            raise NotFound(f"volume {volume_id!r} does not exist")
        return found


class RemoteSnapshotter:
    """Snapshots; see services/operations.py. A snapshot is on the node of its volume.

    Args:
        api: where the objects are.
        registry: reads them; without a node.
        snapshots: a mirror of all of them, to wait with.
    """

    def __init__(self, *, api: ApiServer, registry: KubernetesRegistry, snapshots: Mirror) -> None:
        self._api = api
        self._registry = registry
        self._snapshots = snapshots

    async def create(self, request: CreateSnapshot) -> Snapshot:
        """Have a snapshot cut, or return the one that an equal request made.

        Raises:
            AlreadyExists: the name is taken by a snapshot of another volume.
            NotFound: the volume does not exist.
            ResourceExhausted: the place that is asked for is not the volume's.
            DeadlineExceeded: the node has not finished; the next call waits on.
            VduseError: what the node says.
        """
        snapshot_id = snapshot_id_of(request.name)
        found = await self._api.get(SNAPSHOTS, snapshot_id)
        if found is None:
            await self._api.create(SNAPSHOTS, objects.snapshot_object(await self._plan(snapshot_id, request)))
        elif is_going(found):
            raise _being_deleted(snapshot_id)
        else:
            _require_same_snapshot(found, request)
        found = await wait_settled(self._snapshots, snapshot_id, f"cutting snapshot {snapshot_id}")
        if objects.has_state(found, objects.FAILED):
            await self._api.delete(SNAPSHOTS, snapshot_id)
            raise objects.error_from_status(found) or VduseError(f"snapshot {snapshot_id} could not be made")
        snapshot = objects.snapshot_from_object(found)
        if snapshot is None or snapshot.state is not State.READY:
            raise _being_deleted(snapshot_id)
        return snapshot

    async def delete(self, snapshot_id: str) -> None:
        """Have a snapshot removed; fine if there is none. Volumes restored from it stay.

        Raises:
            DeadlineExceeded: its node has not removed it yet; the next call waits on.
        """
        if is_snapshot_id(snapshot_id) and await self._api.get(SNAPSHOTS, snapshot_id) is not None:
            await self._api.delete(SNAPSHOTS, snapshot_id)
            await wait_gone(self._api, self._snapshots, SNAPSHOTS, snapshot_id)

    async def _plan(self, snapshot_id: str, request: CreateSnapshot) -> Snapshot:
        volume = await self._registry.get_volume(request.source_volume_id)
        if volume is None or volume.state is not State.READY:
            raise NotFound(f"volume {request.source_volume_id!r} does not exist")
        if not satisfies(request.requirement, node_segments(volume.node)):
            raise ResourceExhausted(
                f"a snapshot of {volume.id} can be used on {volume.node} only, which the request excludes"
            )
        return Snapshot(
            id=snapshot_id,
            name=request.name,
            source_volume_id=volume.id,
            pool=volume.pool,
            size_bytes=volume.capacity_bytes,
            created_at_ns=time.time_ns(),
            state=State.CREATING,
            filesystem=volume.filesystem,
            block_size_bytes=volume.parameters.block_size_bytes,
            node=volume.node,
        )


def _attachment(found: Object | None) -> Object | None:
    attachment: Object | None = ((found or {}).get("status") or {}).get("attachment")
    return attachment


def _require_same_snapshot(found: Object, request: CreateSnapshot) -> None:
    spec = found["spec"]
    if spec["snapshotName"] != request.name:
        raise AlreadyExists(
            f"name {request.name!r} has the id of {spec['snapshotName']!r}", hint="choose another name"
        )
    if spec["sourceVolumeId"] != request.source_volume_id:
        raise AlreadyExists(
            f"snapshot {request.name!r} exists and is of volume {spec['sourceVolumeId']}",
            hint="use another name, or delete it first",
        )


def _being_deleted(name: str) -> Pending:
    return Pending(f"an earlier {name} is being deleted", hint="retry when it is gone")
