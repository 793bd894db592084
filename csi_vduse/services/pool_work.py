"""The work on the pools of one place, put together: a node's own pools, or those that are on no node."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from csi_vduse import log
from csi_vduse.backends.pools import Pools
from csi_vduse.errors import VduseError
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.mirror import Mirror, mirroring
from csi_vduse.kube.resources import SNAPSHOTS, VOLUMES
from csi_vduse.services.agent_port import Attachments
from csi_vduse.services.copies import Copies
from csi_vduse.services.locks import LockTable
from csi_vduse.services.node_work import NodeWork
from csi_vduse.services.provisioning import Provisioner
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.snapshotting import Snapshotter
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry, selector
from csi_vduse.volumes.topology import node_segments


class PoolWork:
    """What is wanted of the pools of one place, and who does it.

    Args:
        place: the node's name; empty: pools that are on no node.
        api: where the objects are.
        pools: these.
        agent: knows what is attached there.
        locks: shared with CSI calls that change what we work on.
    """

    def __init__(
        self, place: str, *, api: ApiServer, pools: Pools, agent: Attachments, locks: LockTable
    ) -> None:
        self.registry = KubernetesRegistry(api, place)
        self.volumes = Mirror(api, VOLUMES, selector(place))
        self.reservations = Reservations(self.registry)
        self._snapshots = Mirror(api, SNAPSHOTS, selector(place))
        self._pools = pools
        copies, segments = Copies(agent, locks), node_segments(place)
        self._work = NodeWork(
            node=place,
            api=api,
            registry=self.registry,
            volumes=self.volumes,
            snapshots=self._snapshots,
            provisioner=Provisioner(
                registry=self.registry,
                pools=pools,
                agent=agent,
                copies=copies,
                reservations=self.reservations,
                segments=segments,
            ),
            snapshotter=Snapshotter(
                registry=self.registry,
                pools=pools,
                copies=copies,
                reservations=self.reservations,
                segments=segments,
            ),
            agent=agent,
            copies=copies,
            locks=locks,
        )

    @asynccontextmanager
    async def mirrored(self) -> AsyncIterator[None]:
        """Follow what is wanted while the body runs."""
        async with mirroring(self.volumes, self._snapshots):
            yield

    async def run(self) -> None:
        """Work until cancelled."""
        for backend in self._pools:
            try:
                await backend.clean()
            except VduseError as error:
                log.get().error("pool is not usable now", pool=backend.name, error=str(error))
        await self._work.run()
