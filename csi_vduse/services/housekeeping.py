"""What the leading controller does beside the calls: lets deleted objects go when their nodes are done with them.

An object goes when its node says that nothing is left (`Deleted`), or when the node itself has left the
cluster: its VduseNode is owned by the Node and goes with it, and the data with both. An object without a
node goes when its status says so.
"""

from __future__ import annotations

import asyncio

from csi_vduse import log, metrics
from csi_vduse.errors import NotFound, VduseError
from csi_vduse.kube.api import ApiServer, pause
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import FINALIZER, NODES, Object, Resource, is_going, name_of
from csi_vduse.volumes import kubernetes_objects as objects

_PERIOD_S = 30.0


class Housekeeping:
    """See the module.

    Args:
        api: where the objects are.
        kept: the kinds with our finalizer, and their mirrors.
    """

    def __init__(self, *, api: ApiServer, kept: dict[Resource, Mirror]) -> None:
        self._api = api
        self._kept = kept
        self._wake = asyncio.Event()
        for mirror in kept.values():
            mirror.listen(lambda _name: self._wake.set())

    async def run(self) -> None:
        """Keep house until cancelled."""
        metrics.LEADING.set(True)
        try:
            while True:
                self._wake.clear()
                for resource, mirror in self._kept.items():
                    for found in mirror.all():
                        if is_going(found) and FINALIZER in found["metadata"].get("finalizers", []):
                            await self._look(resource, found)
                await pause(_PERIOD_S, self._wake)
        finally:
            metrics.LEADING.set(False)

    async def _look(self, resource: Resource, found: Object) -> None:
        try:
            if objects.has_state(found, objects.DELETED) or await self._node_is_gone(found):
                await self._let_go(resource, found)
        except NotFound:
            return
        except VduseError as error:
            log.get().warning("a deleted object could not be let go", object=name_of(found), error=str(error))

    async def _node_is_gone(self, found: Object) -> bool:
        node = found["spec"].get("nodeName", "")
        return bool(node) and await self._api.get(NODES, node) is None

    async def _let_go(self, resource: Resource, found: Object) -> None:
        """Take our finalizer off the version that was looked at; Conflict: it is looked at again."""
        kept = [each for each in found["metadata"]["finalizers"] if each != FINALIZER]
        await self._api.replace(resource, {**found, "metadata": {**found["metadata"], "finalizers": kept}})
        log.get().info("a deleted object is gone", kind=resource.kind, object=name_of(found))
