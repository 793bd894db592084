"""Identity, controller and node in one process over a directory registry: what `csi-vduse standalone` serves.

The agent is reached through its client, like everywhere: nothing here knows in which process it runs.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Protocol

from csi_vduse.backends.pools import Pools, open_pools
from csi_vduse.config import StandaloneConfig, parse_endpoint
from csi_vduse.node.context import Agent as NodeAgent
from csi_vduse.node.context import NodeContext
from csi_vduse.proto import csi_pb2_grpc
from csi_vduse.services.agent_port import Agent as ControllerAgent
from csi_vduse.services.controller import Controller
from csi_vduse.services.copies import Copies
from csi_vduse.services.foreign import foreign_volumes
from csi_vduse.services.identity import Identity
from csi_vduse.services.interceptors import Observe
from csi_vduse.services.locks import LockTable
from csi_vduse.services.node import Node
from csi_vduse.services.places import LocalPlaces
from csi_vduse.services.provisioning import Provisioner
from csi_vduse.services.publishing import KnownNodes, Publisher
from csi_vduse.services.reconcile import reconcile
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.server import start_server
from csi_vduse.services.snapshotting import Snapshotter
from csi_vduse.volumes.registry import Registry
from csi_vduse.volumes.registry_directory import DirectoryRegistry
from csi_vduse.volumes.topology import node_segments


class Agent(ControllerAgent, NodeAgent, Protocol):
    """All that controller and node need of the agent; AgentClient has it."""


NodeFactory = Callable[[NodeContext], csi_pb2_grpc.NodeServicer]


@asynccontextmanager
async def serving(
    config: StandaloneConfig, agent: Agent, make_node: NodeFactory = Node, *, observe: Observe | None = None
) -> AsyncIterator[None]:
    """Serve CSI on the configured endpoint while the body runs, then stop gracefully.

    Args:
        config: endpoint, node id, state directory, pools.
        agent: answers already, or will soon.
        make_node: makes the node service; tests change what it works with.
        observe: is told of every ended call.

    Raises:
        FailedPrecondition: the socket is taken or cannot be made.
        InvalidArgument: a pool or the endpoint is not what it should be.
    """
    socket_path = parse_endpoint(config.endpoint)
    async with AsyncExitStack() as stack:
        registry = DirectoryRegistry(config.state_dir)
        stack.callback(registry.close)
        pools = open_pools(config.pools, config.state_dir)
        stack.callback(pools.close)
        foreign = stack.enter_context(foreign_volumes(config.state_dir))
        locks = LockTable()
        controller = await _start_controller(config, registry, pools, agent, locks)
        node = make_node(
            NodeContext(
                node_id=config.node_id,
                agent=agent,
                registry=registry,
                data_path=pools.data_path,
                foreign=foreign,
            )
        )
        server = await start_server(
            socket_path,
            [
                partial(csi_pb2_grpc.add_IdentityServicer_to_server, Identity(agent)),
                partial(csi_pb2_grpc.add_ControllerServicer_to_server, controller),
                partial(csi_pb2_grpc.add_NodeServicer_to_server, node),
            ],
            observe=observe,
            table=locks,
        )
        stack.push_async_callback(server.stop)
        yield


async def _start_controller(
    config: StandaloneConfig, registry: Registry, pools: Pools, agent: ControllerAgent, locks: LockTable
) -> Controller:
    """Make the controller, and finish what an earlier process left before it takes calls."""
    segments = node_segments(config.node_id)
    reservations = Reservations(registry)
    copies = Copies(agent, locks)
    provisioner = Provisioner(
        registry=registry,
        pools=pools,
        agent=agent,
        copies=copies,
        reservations=reservations,
        segments=segments,
    )
    snapshotter = Snapshotter(
        registry=registry, pools=pools, copies=copies, reservations=reservations, segments=segments
    )
    await reconcile(registry=registry, pools=pools, provisioner=provisioner, snapshotter=snapshotter)
    return Controller(
        registry=registry,
        provisioner=provisioner,
        snapshotter=snapshotter,
        publisher=Publisher(
            registry=registry,
            pools=pools,
            own_node=config.node_id,
            nodes=KnownNodes(frozenset({config.node_id, *config.peer_nodes})),
        ),
        places=LocalPlaces(pools=pools, reservations=reservations, segments=segments),
    )
