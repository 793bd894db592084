"""The pools as the controller sees them, and where a new volume goes. Decisions are pure.

Every node measures its pools and says so in the status of its VduseNode; pools that are on no node are measured
when they are looked at. What is promised is counted here,
from the volumes as they are now, begun or not. So two volumes that are placed one after the other never
share the same room, and a node's own reservation (reserving.py) is the last word.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from csi_vduse import log
from csi_vduse.backends.accounting import available_bytes
from csi_vduse.backends.base import Backend, PoolUsage
from csi_vduse.backends.pools import DEFAULT_POOL
from csi_vduse.errors import InvalidArgument, ResourceExhausted, VduseError
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import Object, name_of
from csi_vduse.services.validation import GetCapacity
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.model import Snapshot, Volume
from csi_vduse.volumes.policy import objection
from csi_vduse.volumes.topology import Segments, TopologyRequirement, includes, node_segments, satisfies

# A node that said nothing for so long is asked last: it is most likely down.
_SILENT_S = 180.0


@dataclass(frozen=True)
class NodePool:
    """A pool of a node, or of none.

    Args:
        node: its name; empty: volumes of the pool can be used everywhere.
        pool: its name; pools of one name on several nodes are one choice to users.
        kind: of its backend.
        usage: as measured; None if the pool is not usable now.
        is_live: whether that was said lately.
    """

    node: str
    pool: str
    kind: str
    usage: PoolUsage | None
    is_live: bool


class NodesView:
    """What the mirrors hold, as values; the `Places` of a cluster.

    Args:
        nodes: VduseNode objects.
        volumes: VduseVolume objects.
        snapshots: VduseSnapshot objects.
        shared: the pools that are on no node.
    """

    def __init__(
        self, *, nodes: Mirror, volumes: Mirror, snapshots: Mirror, shared: Iterable[Backend] = ()
    ) -> None:
        self._nodes = nodes
        self._volumes = volumes
        self._snapshots = snapshots
        self._shared = shared

    def segments(self, volume: Volume) -> Segments:
        """Return the volume's node; nothing for one that every node can use."""
        return node_segments(volume.node)

    async def problem(self, volume: Volume) -> str:
        """Return what the volume's node says is wrong with it."""
        found = self._volumes.get(volume.id)
        health = (found or {}).get("status", {}).get("health", {})
        message: str = health.get("message", "") if health.get("status") != "Healthy" else ""
        return message

    async def room(self, asked: GetCapacity) -> list[int]:
        """Look at the pools of the place that is asked for."""
        pools = await self.pools()
        name = asked.asked.pool or default_pool(pools)
        bus = asked.asked.bus or Bus.VIRTIO
        fitting = [
            pool
            for pool in pools
            if (name is None or pool.pool == name)
            and includes(asked.place, node_segments(pool.node))
            and not any(objection(use, backend=pool.kind, bus=bus) for use in asked.uses)
        ]
        if not fitting and asked.asked.pool and asked.asked.pool not in {pool.pool for pool in pools}:
            raise unknown_pool(asked.asked.pool, pools)
        return [self.left_bytes(pool) for pool in fitting]

    async def pools(self) -> list[NodePool]:
        """Return every pool of every node, by node and name, then those that are on none."""
        now = dt.datetime.now(dt.UTC)
        of_nodes = [
            pool for found in sorted(self._nodes.all(), key=name_of) for pool in _pools_of(found, now)
        ]
        return of_nodes + [await _measured(backend) for backend in self._shared]

    def left_bytes(self, pool: NodePool) -> int:
        """Return what may still be promised in a pool, in bytes."""
        if pool.usage is None:
            return 0
        return available_bytes(
            pool.usage,
            pool=pool.pool,
            volumes=[volume for volume in promised_volumes(self._volumes.all()) if volume.node == pool.node],
            snapshots=[one for one in _snapshots(self._snapshots.all()) if one.node == pool.node],
        )

    def choose(
        self,
        pools: Sequence[NodePool],
        requirement: TopologyRequirement | None,
        *,
        pool: str,
        need_bytes: int,
        node: str | None = None,
    ) -> NodePool:
        """Choose where a new volume goes: where its source is, else where it is preferred most, else where most room is.

        A preference comes from Kubernetes' scheduler, which has chosen a node for the pod. A volume with a source cannot
        heed it: the scheduler sees where the volume is, and moves the pod there. One without a source is on that node or
        nowhere: only the scheduler knows whether the pod could run elsewhere, and it chooses again after a refusal.

        Args:
            pools: what there is.
            requirement: where the caller wants it.
            pool: in a pool of this name.
            need_bytes: its capacity.
            node: the only one that is possible (that of its source), if so.

        Raises:
            InvalidArgument: there is no such pool.
            ResourceExhausted: none of them is allowed, or none has the room.
        """
        named = [each for each in pools if each.pool == pool]
        if not named:
            raise unknown_pool(pool, pools)
        wanted = requirement.preferred[0] if requirement and requirement.preferred and node is None else {}
        allowed = [
            each
            for each in named
            if satisfies(requirement, node_segments(each.node))
            and node in {None, each.node}
            and includes(wanted, node_segments(each.node))
        ]
        if not allowed:
            raise ResourceExhausted(
                f"pool {pool!r} is on {', '.join(each.node for each in named)} only, which the request excludes",
                hint="file pools belong to one node; use volumeBindingMode: WaitForFirstConsumer",
            )
        left = {each: self.left_bytes(each) for each in allowed}
        roomy = [each for each in allowed if left[each] >= need_bytes]
        if not roomy:
            most = max(left.values())
            raise ResourceExhausted(
                f"{need_bytes} bytes are needed; of pool {pool!r} at most {most} are left on a node that is allowed",
                hint="delete volumes or snapshots, enlarge the pool's file system, or use another pool",
            )
        return min(roomy, key=lambda each: (not each.is_live, -left[each]))


def default_pool(pools: Sequence[NodePool]) -> str | None:
    """Return the pool for requests that name none: the only one, or the one called "default"."""
    names = {pool.pool for pool in pools}
    if len(names) == 1:
        return next(iter(names))
    return DEFAULT_POOL if DEFAULT_POOL in names else None


def unknown_pool(name: str, pools: Iterable[NodePool]) -> InvalidArgument:
    """Return the error for a pool that is nowhere."""
    known = ", ".join(sorted({pool.pool for pool in pools}))
    return InvalidArgument(
        f"parameter pool: {name!r} is not a pool here; allowed: {known or 'none yet'}",
        hint="" if known else "no node has reported its pools: look at `kubectl get vdusenodes`",
    )


def promised_volumes(found: Iterable[Object]) -> list[Volume]:
    """Return every volume that takes or will take room: also those that their nodes have not begun."""
    live = [each for each in found if not objects.has_state(each, objects.FAILED, objects.DELETED)]
    return [objects.volume_from_object(each) or objects.wanted_volume(each) for each in live]


def _snapshots(found: Iterable[Object]) -> list[Snapshot]:
    snapshots = (objects.snapshot_from_object(each) for each in found)
    return [snapshot for snapshot in snapshots if snapshot is not None]


async def _measured(backend: Backend) -> NodePool:
    usage = None
    try:
        usage = await backend.usage()
    except VduseError as error:
        log.get().warning("pool is not usable now", pool=backend.name, error=str(error))
    return NodePool(node="", pool=backend.name, kind=backend.kind, usage=usage, is_live=usage is not None)


def _pools_of(found: Object, now: dt.datetime) -> list[NodePool]:
    status = found.get("status", {})
    seen = status.get("lastSeen")
    age_s = (now - dt.datetime.fromisoformat(seen)).total_seconds() if seen else float("inf")
    return [
        NodePool(
            node=name_of(found),
            pool=pool["name"],
            kind=pool["kind"],
            usage=None
            if pool.get("problem")
            else PoolUsage(int(pool["totalBytes"]), int(pool["foreignBytes"]), int(pool["snapshotBytes"])),
            is_live=bool(status.get("ready")) and age_s < _SILENT_S,
        )
        for pool in status.get("pools", [])
    ]
