"""Publishing in a cluster: as publishing.py does it, and where to is said in the volume's status.

The storage server decides and remembers; the status is for people, and keeps a volume in use from being deleted or
its driver uninstalled. The status of a volume on a node is that node's to write.
"""

from __future__ import annotations

from contextlib import suppress

from csi_vduse.errors import NotFound
from csi_vduse.kube.resources import VOLUMES, Object
from csi_vduse.services.publishing import Publisher
from csi_vduse.services.validation import PublishVolume
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry


class ToldPublisher:
    """See the module, and the Protocol Publishing for the methods.

    Args:
        publisher: does it.
        registry: has the volumes.
    """

    def __init__(self, publisher: Publisher, registry: KubernetesRegistry) -> None:
        self._publisher = publisher
        self._registry = registry

    @property
    def offered(self) -> bool:
        """Whether there are volumes that have to be published."""
        return self._publisher.offered

    async def publish(self, request: PublishVolume) -> dict[str, str]:
        """Let a node use a volume; return what it must be told."""
        told = await self._publisher.publish(request)
        volume = await self._registry.get_volume(request.volume_id) if told else None
        if volume is not None:  # an export that was made beforehand has no object
            await self._tell(volume)
        return told

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take a volume back from a node, or from all if node_id is empty."""
        await self._publisher.unpublish(volume_id, node_id)
        volume = await self._registry.get_volume(volume_id)
        if volume is not None and not volume.node:
            await self._tell(volume)

    async def published(self) -> dict[str, tuple[str, ...]]:
        """Return the ids of published volumes and of their nodes."""
        return await self._publisher.published()

    async def nodes_of(self, volume: Volume) -> tuple[str, ...]:
        """Return the nodes of one volume."""
        return await self._publisher.nodes_of(volume)

    async def _tell(self, volume: Volume) -> None:
        nodes = await self._publisher.nodes_of(volume)
        attachment = {"node": ", ".join(nodes), "state": "published"} if nodes else None

        def status(now: Object) -> Object:
            return {**now.get("status", {}), "attachment": attachment}

        with suppress(NotFound):  # deleted meanwhile
            await self._registry.update_status(VOLUMES, volume.id, status)
