"""The node plugin's process, put together: Identity and Node for kubelet, and the work for this node's pools.

Order at start: the CSI socket answers; then the agent is waited for; then the registration socket appears in
kubelet's directory; when kubelet has registered us the start-up taint goes. Nothing of this waits for the
Kubernetes API but the last. At the end the registration goes first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from typing import Protocol

from csi_vduse import DRIVER_NAME, log, metrics
from csi_vduse.agent.model import Probe, VolumeStats, count_states
from csi_vduse.backends.pools import Pools, open_pools
from csi_vduse.config import NodeConfig
from csi_vduse.errors import VduseError
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.taints import remove_taint
from csi_vduse.node.context import Agent as NodeAgent
from csi_vduse.node.context import NodeContext
from csi_vduse.proto import csi_pb2_grpc
from csi_vduse.services import http
from csi_vduse.services.agent_port import Agent as ControllerAgent
from csi_vduse.services.foreign import foreign_volumes
from csi_vduse.services.identity import Identity
from csi_vduse.services.locks import LockTable
from csi_vduse.services.node import Node
from csi_vduse.services.node_status import NodeStatus
from csi_vduse.services.pool_work import PoolWork
from csi_vduse.services.registration import Registration, serve_registration
from csi_vduse.services.server import start_server

# Calls after which what is attached may have changed.
_ATTACHING = frozenset({"NodeStageVolume", "NodeUnstageVolume"})
_AGENT_PERIOD_S = 2.0
_TAINT_PERIOD_S = 5.0
_SCRAPE_TIMEOUT_S = 15.0


NodeFactory = Callable[[NodeContext], csi_pb2_grpc.NodeServicer]


class Fitness:
    """What is known of the agent, for /readyz."""

    def __init__(self) -> None:
        self.problem = "the agent was not asked yet"

    def heard(self, probe: Probe) -> None:
        """Remember what a probe found."""
        self.problem = "" if probe.ready else "; ".join(probe.problems) or "the agent is not ready"


class Agent(ControllerAgent, NodeAgent, Protocol):
    """All that the node plugin needs of the agent; AgentClient has it."""

    async def stats(self) -> list[VolumeStats]:
        """Return the counters of all workers."""
        ...


@asynccontextmanager
async def serving(
    config: NodeConfig, api: ApiServer, agent: Agent, make_node: NodeFactory = Node
) -> AsyncIterator[None]:
    """Be the node plugin while the body runs.

    Args:
        config: what it is told.
        api: the Kubernetes API; may be away.
        agent: answers already, or will.
        make_node: makes the node service; tests change what it works with.

    Raises:
        FailedPrecondition: a socket or address cannot be bound.
        InvalidArgument: a pool is not what it should be.
    """
    fitness, locks = Fitness(), LockTable()
    pools = open_pools(config.pools, config.state_dir)
    work = PoolWork(config.node_id, api=api, pools=pools, agent=agent, locks=locks)
    registration = Registration(
        driver_name=DRIVER_NAME,
        endpoint=config.endpoint,
        on_registered=partial(_registered, config, api),
    )
    checks: dict[str, Callable[[], str]] = {
        "agent": lambda: fitness.problem,
        "kubelet": lambda: registration.problem,
    }
    metrics.REGISTERED.set(False)
    async with AsyncExitStack() as stack:
        stack.callback(pools.close)
        await stack.enter_async_context(http.serving(config.http_address, checks))
        stack.enter_context(metrics.collecting(_reader(agent)))
        attached = asyncio.Event()

        def observe(method: str, code: str, seconds: float) -> None:
            metrics.observe_rpc(method, code, seconds)
            if method in _ATTACHING:
                attached.set()

        context = NodeContext(
            node_id=config.node_id,
            agent=agent,
            registry=work.registry,
            data_path=pools.data_path,
            foreign=stack.enter_context(foreign_volumes(config.state_dir)),
        )
        server = await start_server(
            config.endpoint,
            [
                partial(csi_pb2_grpc.add_IdentityServicer_to_server, Identity(agent)),
                partial(csi_pb2_grpc.add_NodeServicer_to_server, make_node(context)),
            ],
            observe=observe,
            table=locks,
        )
        stack.push_async_callback(server.stop)
        await stack.enter_async_context(
            _working(config, api, work=work, pools=pools, agent=agent, fitness=fitness, attached=attached)
        )
        registering = asyncio.create_task(_register(config, registration, agent, fitness))
        stack.push_async_callback(_stop, registering)
        yield


@asynccontextmanager
async def _working(
    config: NodeConfig,
    api: ApiServer,
    *,
    work: PoolWork,
    pools: Pools,
    agent: Agent,
    fitness: Fitness,
    attached: asyncio.Event,
) -> AsyncIterator[None]:
    """Work for this node's pools, and tell how they are."""
    status = NodeStatus(
        node=config.node_id,
        api=api,
        registry=work.registry,
        volumes=work.volumes,
        pools=pools,
        reservations=work.reservations,
        agent=agent,
        on_probe=fitness.heard,
        attached=attached,
    )
    tasks = [asyncio.create_task(work.run()), asyncio.create_task(status.run())]
    async with work.mirrored():
        try:
            yield
        finally:
            for task in tasks:
                await _stop(task)


async def _register(config: NodeConfig, registration: Registration, agent: Agent, fitness: Fitness) -> None:
    """Wait for a fit agent, then lay the socket into kubelet's directory until cancelled."""
    while True:
        with suppress(VduseError):
            probe = await agent.probe()
            fitness.heard(probe)
            if probe.ready:
                break
        await asyncio.sleep(_AGENT_PERIOD_S)
    server = await serve_registration(registration, config.registration)
    log.get().info("registering with kubelet", socket=str(config.registration))
    try:
        await asyncio.Event().wait()
    finally:
        config.registration.unlink(missing_ok=True)
        metrics.REGISTERED.set(False)
        await server.stop(0)


async def _registered(config: NodeConfig, api: ApiServer) -> None:
    metrics.REGISTERED.set(True)
    if config.startup_taint:
        task = asyncio.create_task(_untaint(config, api))
        _UNTAINTING.add(task)
        task.add_done_callback(_UNTAINTING.discard)


_UNTAINTING: set[asyncio.Task[None]] = set()  # asyncio keeps no reference of its own


async def _untaint(config: NodeConfig, api: ApiServer) -> None:
    while True:
        try:
            await remove_taint(api, config.node_id, config.startup_taint)
        except VduseError as error:
            log.get().warning("the start-up taint could not be taken off", error=str(error))
            await asyncio.sleep(_TAINT_PERIOD_S)
        else:
            return


def _reader(agent: Agent) -> metrics.Read:
    loop = asyncio.get_running_loop()

    async def ask() -> tuple[list[VolumeStats], dict[str, int]]:
        stats, attachments = await asyncio.gather(agent.stats(), agent.list())
        return stats, count_states(attachment.state for attachment in attachments)

    def read() -> tuple[list[VolumeStats], dict[str, int]]:
        return asyncio.run_coroutine_threadsafe(ask(), loop).result(_SCRAPE_TIMEOUT_S)

    return read


async def _stop(task: asyncio.Task[None]) -> None:
    task.cancel()
    with suppress(asyncio.CancelledError):
        await task
