"""The controller's process in a cluster, put together: Identity and Controller, no node, no agent.

Any number run at once and answer calls; one of them leads: it keeps house, and works on the pools that are on no node
as a node does on its own. What they know is in the API.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Any

from csi_vduse import __version__, metrics
from csi_vduse.agent.model import Probe
from csi_vduse.backends.pools import open_pools
from csi_vduse.config import ControllerConfig
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.lease import Election
from csi_vduse.kube.mirror import Mirror, mirroring
from csi_vduse.kube.resources import NODES, SNAPSHOTS, VOLUMES
from csi_vduse.proto import csi_pb2_grpc
from csi_vduse.services import http
from csi_vduse.services.agent_port import NothingAttached
from csi_vduse.services.controller import Controller
from csi_vduse.services.housekeeping import Housekeeping
from csi_vduse.services.identity import Identity
from csi_vduse.services.locks import LockTable
from csi_vduse.services.nodes_view import NodesView
from csi_vduse.services.pool_work import PoolWork
from csi_vduse.services.publishing import Publisher
from csi_vduse.services.publishing_told import ToldPublisher
from csi_vduse.services.remote import RemoteProvisioner, RemoteSnapshotter
from csi_vduse.services.server import start_server
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry

_LEASE = "csi-vduse-controller"
# A controller that heard nothing for so long cannot answer truthfully; nothing is restarted for it.
_SILENT_S = 180.0


class Mirrors:
    """What the controller knows of the cluster; answers Probe and /readyz."""

    def __init__(self, api: ApiServer) -> None:
        self.nodes = Mirror(api, NODES)
        self.volumes = Mirror(api, VOLUMES)
        self.snapshots = Mirror(api, SNAPSHOTS)

    def problem(self) -> str:
        """Say why calls cannot be answered now, or nothing."""
        mirrors = (self.nodes, self.volumes, self.snapshots)
        if not all(mirror.synced for mirror in mirrors):
            return "the Kubernetes API has not answered yet"
        if any(mirror.age_s() > _SILENT_S for mirror in mirrors):
            return f"nothing was heard from the Kubernetes API for {_SILENT_S:g} s"
        return ""

    async def has(self, node_id: str) -> bool:
        """Tell whether a node runs the driver, or did."""
        return self.nodes.get(node_id) is not None

    async def probe(self) -> Probe:
        """Tell whether calls can be answered now; what Identity asks."""
        problem = self.problem()
        return Probe(__version__, not problem, (problem,) if problem else (), max_volumes=0)


@asynccontextmanager
async def serving(config: ControllerConfig, api: ApiServer) -> AsyncIterator[Mirrors]:
    """Be a controller while the body runs; gives what it knows of the cluster.

    Raises:
        FailedPrecondition: the socket or the address cannot be bound.
    """
    mirrors, registry = Mirrors(api), KubernetesRegistry(api)
    pools = open_pools(config.pools, config.state_dir)
    # Locks of its own: our calls hold theirs while they wait for this work.
    shared = PoolWork("", api=api, pools=pools, agent=NothingAttached(), locks=LockTable())
    view = NodesView(nodes=mirrors.nodes, volumes=mirrors.volumes, snapshots=mirrors.snapshots, shared=pools)
    controller = Controller(
        registry=registry,
        provisioner=RemoteProvisioner(api=api, registry=registry, volumes=mirrors.volumes, view=view),
        snapshotter=RemoteSnapshotter(api=api, registry=registry, snapshots=mirrors.snapshots),
        publisher=ToldPublisher(
            Publisher(registry=registry, pools=pools, own_node="", nodes=mirrors), registry
        ),
        places=view,
    )
    house = Housekeeping(api=api, kept={VOLUMES: mirrors.volumes, SNAPSHOTS: mirrors.snapshots})
    election = Election(api, namespace=config.lease_namespace, name=_LEASE, identity=config.identity)
    checks: dict[str, Callable[[], str]] = {"kubernetes": mirrors.problem}
    metrics.LEADING.set(False)
    async with AsyncExitStack() as stack:
        await stack.enter_async_context(http.serving(config.http_address, checks))
        stack.callback(pools.close)
        await stack.enter_async_context(mirroring(mirrors.nodes, mirrors.volumes, mirrors.snapshots))
        work: list[Callable[[], Coroutine[Any, Any, None]]] = [house.run]
        if pools.names:
            await stack.enter_async_context(shared.mirrored())
            work.append(shared.run)
        leading = asyncio.create_task(election.lead(partial(_all, work)))
        stack.push_async_callback(_resign, election, leading)
        server = await start_server(
            config.endpoint,
            [
                partial(csi_pb2_grpc.add_IdentityServicer_to_server, Identity(mirrors)),
                partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller),
            ],
            observe=metrics.observe_rpc,
        )
        stack.push_async_callback(server.stop)
        yield mirrors


async def _all(work: Iterable[Callable[[], Coroutine[Any, Any, None]]]) -> None:
    async with asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each())


async def _resign(election: Election, leading: asyncio.Task[None]) -> None:
    """Stop the leader's work, then give the lease back: another takes it at once."""
    was_leading = election.leading
    leading.cancel()
    with suppress(asyncio.CancelledError):
        await leading
    if was_leading:
        await election.release()
