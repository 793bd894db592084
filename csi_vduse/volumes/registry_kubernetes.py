"""A registry in the Kubernetes API: an object VduseVolume or VduseSnapshot for each, see kubernetes_objects.py.

Several processes use it at once. Keeps true: every write replaces the version that was read, so nothing that
another wrote in between is lost; an object that changed is read again and the decision is made again. Who works on
objects writes their status; only who asks for work makes objects, and asks for their deletion.
"""

from __future__ import annotations

from collections.abc import Callable

from csi_vduse.errors import NotFound, Unavailable
from csi_vduse.kube.api import ApiServer, Conflict
from csi_vduse.kube.resources import SNAPSHOTS, VOLUMES, Object, Resource
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.ids import is_snapshot_id, is_volume_id
from csi_vduse.volumes.model import Snapshot, Volume

_TRIES = 8  # each loses to another writer that made progress; more than a few are a writer gone mad

Status = Callable[[Object], Object | None]


class KubernetesRegistry:
    """See the module, and the Protocol Registry for the methods.

    Args:
        api: where the objects are.
        node: whose objects this process works on: its lists hold those only. Empty: those of pools that are on no
            node. None: it asks for work, and its lists hold all.
    """

    def __init__(self, api: ApiServer, node: str | None = None) -> None:
        self._api = api
        self._node = node
        self._selector = "" if node is None else selector(node)

    async def get_volume(self, volume_id: str) -> Volume | None:
        """Return the volume, or None."""
        found = await self._api.get(VOLUMES, volume_id) if is_volume_id(volume_id) else None
        return objects.volume_from_object(found) if found is not None else None

    async def put_volume(self, volume: Volume) -> None:
        """Write the record; who asks for work makes the object too, if there is none.

        Raises:
            NotFound: the object is gone, and who works on objects makes none.
        """
        await self._put(
            VOLUMES,
            volume.id,
            lambda: objects.volume_object(volume),
            lambda found: objects.volume_status(volume, found.get("status", {})),
        )

    async def update_volume(self, volume_id: str, change: Callable[[Volume], Volume]) -> Volume:
        """Replace the record by `change(record)` with nothing written in between.

        What a spec holds (the throttle) stays as it is: the controller writes that with `update_spec`.

        Raises:
            NotFound: no such volume.
        """
        changed: list[Volume] = []

        def status(found: Object) -> Object:
            volume = objects.volume_from_object(found)
            if volume is None:
                raise _missing("volume", volume_id)
            changed[:] = [change(volume)]
            return objects.volume_status(changed[0], found["status"])

        if not is_volume_id(volume_id):
            raise _missing("volume", volume_id)
        await self.update_status(VOLUMES, volume_id, status)
        return changed[0]

    async def delete_volume(self, volume_id: str) -> None:
        """Record that there is nothing behind the object any more; fine if it is gone."""
        if is_volume_id(volume_id):
            await self._delete(VOLUMES, volume_id)

    async def list_volumes(self) -> list[Volume]:
        """Return all volumes in whatever state, oldest first."""
        found = [objects.volume_from_object(each) for each in (await self._list(VOLUMES))]
        volumes = [volume for volume in found if volume is not None]
        return sorted(volumes, key=lambda volume: (volume.created_at_ns, volume.id))

    async def get_snapshot(self, snapshot_id: str) -> Snapshot | None:
        """Return the snapshot, or None."""
        found = await self._api.get(SNAPSHOTS, snapshot_id) if is_snapshot_id(snapshot_id) else None
        return objects.snapshot_from_object(found) if found is not None else None

    async def put_snapshot(self, snapshot: Snapshot) -> None:
        """Write the record; as `put_volume`."""
        await self._put(
            SNAPSHOTS,
            snapshot.id,
            lambda: objects.snapshot_object(snapshot),
            lambda found: objects.snapshot_status(snapshot, found.get("status", {})),
        )

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Record that there is nothing behind the object any more; fine if it is gone."""
        if is_snapshot_id(snapshot_id):
            await self._delete(SNAPSHOTS, snapshot_id)

    async def list_snapshots(self) -> list[Snapshot]:
        """Return all snapshots in whatever state, oldest first."""
        found = [objects.snapshot_from_object(each) for each in (await self._list(SNAPSHOTS))]
        snapshots = [snapshot for snapshot in found if snapshot is not None]
        return sorted(snapshots, key=lambda snapshot: (snapshot.created_at_ns, snapshot.id))

    async def update_status(self, resource: Resource, name: str, status: Status) -> Object:
        """Replace an object's status by `status(object)`; None, or the same, writes nothing. Returns the object.

        Raises:
            NotFound: there is no such object.
        """
        return await self._update(resource, name, status, "status")

    async def update_spec(self, resource: Resource, name: str, spec: Status) -> Object:
        """Replace an object's spec by `spec(object)`, as `update_status`; for the controller only."""
        return await self._update(resource, name, spec, "spec")

    async def _update(self, resource: Resource, name: str, change: Status, part: str) -> Object:
        for _ in range(_TRIES):
            found = await self._api.get(resource, name)
            if found is None:
                raise _missing(resource.kind, name)
            after = change(found)
            if after is None or after == found.get(part, {}):
                return found
            try:
                return await self._api.replace(resource, {**found, part: after}, status=part == "status")
            except Conflict:
                continue
        raise Unavailable(f"{resource.kind} {name!r} changes all the time", hint="retry")

    async def _put(
        self, resource: Resource, name: str, made: Callable[[], Object], status: Callable[[Object], Object]
    ) -> None:
        try:
            await self.update_status(resource, name, status)
        except NotFound:
            if self._node is not None:
                raise
            await self._api.create(resource, made())
            await self.update_status(resource, name, status)

    async def _delete(self, resource: Resource, name: str) -> None:
        """See delete_volume. An object that nobody deleted (an unfinished try) goes back to not begun."""

        def status(found: Object) -> Object:
            going = "deletionTimestamp" in found["metadata"]
            kept = {key: value for key, value in found.get("status", {}).items() if key == "error"}
            return {**kept, "state": objects.DELETED} if going else kept

        try:
            if self._node is None:
                await self._api.delete(resource, name)
            await self.update_status(resource, name, status)
        except NotFound:
            return

    async def _list(self, resource: Resource) -> list[Object]:
        found, _ = await self._api.list(resource, self._selector)
        return found


def selector(node: str) -> str:
    """Return the field selector of a node's objects; of no node: of the pools that are on none."""
    return f"spec.nodeName={node}"


def _missing(kind: str, name: str) -> NotFound:
    return NotFound(f"{kind} {name!r} does not exist")
