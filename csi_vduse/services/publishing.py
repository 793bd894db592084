"""Who may use which volume: ControllerPublishVolume and ControllerUnpublishVolume.

A volume of a shared pool is fenced where it is stored: the storage server remembers who has it and refuses the
others, so nothing is remembered here, and what a controller says is true even if another one said it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from csi_vduse.backends import nbd
from csi_vduse.backends.pools import Pools
from csi_vduse.dataplane import nbd_uri
from csi_vduse.errors import FailedPrecondition, InvalidArgument, NotFound
from csi_vduse.services.validation import PublishVolume
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.context import READ_ONLY
from csi_vduse.volumes.model import State, Volume
from csi_vduse.volumes.policy import READER_MODES, AccessMode, is_shared, objection
from csi_vduse.volumes.registry import Registry


class Nodes(Protocol):
    """The nodes that there are."""

    async def has(self, node_id: str) -> bool:
        """Tell whether there is a node of this id; may raise Unavailable."""
        ...


@dataclass(frozen=True)
class KnownNodes:
    """Nodes that are named in the configuration."""

    ids: frozenset[str]

    async def has(self, node_id: str) -> bool:
        """Look into the list."""
        return node_id in self.ids


class Publishing(Protocol):
    """What the controller asks; `Publisher` says what may be raised."""

    @property
    def offered(self) -> bool:
        """Whether there are volumes that have to be published."""
        ...

    async def publish(self, request: PublishVolume) -> dict[str, str]:
        """Let a node use a volume; return what it must be told."""
        ...

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take a volume back from a node, or from all if node_id is empty."""
        ...

    async def published(self) -> dict[str, tuple[str, ...]]:
        """Return the ids of published volumes and of their nodes."""
        ...

    async def nodes_of(self, volume: Volume) -> tuple[str, ...]:
        """Return the nodes of one volume, whatever storage other volumes are on."""
        ...


class Publisher:
    """Publishes and takes back.

    Args:
        registry: the records of volumes.
        pools: where they live.
        own_node: the node of volumes that are not shared and whose records name none.
        nodes: those that volumes may be published to.
    """

    def __init__(self, *, registry: Registry, pools: Pools, own_node: str, nodes: Nodes) -> None:
        self._registry = registry
        self._pools = pools
        self._own_node = own_node
        self._nodes = nodes

    @property
    def offered(self) -> bool:
        """Whether there is a pool whose volumes are published."""
        return any(is_shared(backend.kind) for backend in self._pools)

    async def publish(self, request: PublishVolume) -> dict[str, str]:
        """Let a node use a volume; return what it must be told.

        Raises:
            NotFound: there is no such volume, or no such node.
            InvalidArgument: the volume can never be used so.
            AlreadyExists: the node has it otherwise.
            FailedPrecondition: another node's use excludes this one, or the volume cannot be used there.
            Unavailable: the storage server is away.
        """
        told = await self._publish(request)
        return {**told, READ_ONLY: "true"} if _read_only(request) else told

    async def _publish(self, request: PublishVolume) -> dict[str, str]:
        volume = await self._registry.get_volume(request.volume_id)
        if volume is None and nbd.URI in request.context:
            return await self._publish_static(request)
        if volume is None or volume.state is not State.READY:
            raise NotFound(f"volume {request.volume_id!r} does not exist")
        if not await self._nodes.has(request.node_id):
            raise NotFound(
                f"node {request.node_id!r} does not exist", hint="standalone knows --peer-node only"
            )
        reason = objection(request.use, backend=volume.backend, bus=volume.parameters.bus)
        if reason:
            raise InvalidArgument(reason)
        if not is_shared(volume.backend):
            home = volume.node or self._own_node
            if request.node_id != home:
                raise FailedPrecondition(f"volume {volume.id} can be used on node {home} only")
            return {}
        return await self._pools.holding(volume.pool).publish(
            volume,
            request.node_id,
            read_only=_read_only(request),
            shared=request.use.mode is AccessMode.MULTI_NODE_MULTI_WRITER,
        )

    async def _publish_static(self, request: PublishVolume) -> dict[str, str]:
        """Answer for an export that was made beforehand: nothing is done, and nobody is fenced."""
        uri = request.context[nbd.URI]
        nbd_uri.parse(uri)
        if not await self._nodes.has(request.node_id):
            raise NotFound(
                f"node {request.node_id!r} does not exist", hint="standalone knows --peer-node only"
            )
        reason = objection(request.use, backend=nbd.KIND, bus=Bus.VIRTIO)
        if not reason and request.use.mode is AccessMode.MULTI_NODE_MULTI_WRITER:
            reason = "nobody fences an export that was made beforehand, so one node at a time may write it"
        if reason:
            raise InvalidArgument(reason)
        return {nbd.URI: uri}

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take a volume back from a node, or from all if node_id is empty; fine if there is nothing to take.

        Raises:
            Unavailable: the storage server is away, or requests of the node are still in flight.
        """
        volume = await self._registry.get_volume(volume_id)
        if volume is not None and is_shared(volume.backend):
            await self._pools.holding(volume.pool).unpublish(volume_id, node_id)

    async def published(self) -> dict[str, tuple[str, ...]]:
        """Return the ids of published volumes and of their nodes; a volume on a node is always published there."""
        listed = await self._registry.list_volumes()
        found: dict[str, tuple[str, ...]] = {one.id: (one.node,) for one in listed if one.node}
        for backend in self._pools:
            found.update(await backend.published())
        return found

    async def nodes_of(self, volume: Volume) -> tuple[str, ...]:
        """Return the nodes of one volume, whatever storage other volumes are on.

        Raises:
            Unavailable: its storage server is away.
        """
        if volume.node:
            return (volume.node,)
        return await self._pools.holding(volume.pool).nodes_of(volume.id)


def _read_only(request: PublishVolume) -> bool:
    """Tell whether the node may only read: its access mode says so, or the PersistentVolume does (`csi.readOnly`)."""
    return request.read_only or request.use.mode in READER_MODES
