"""The processes behind `agent`, `standalone`, `export`: a spawner with its child, or the parts of an attach.

The first process must not import gRPC (agent/spawner.py says why): modules that do are imported in the child.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from csi_vduse.agent.attach import Node
from csi_vduse.agent.kernel import VduseKernel
from csi_vduse.agent.place import is_vacant
from csi_vduse.agent.spawner import run_spawner
from csi_vduse.agent.store import Store
from csi_vduse.agent.workers import WorkerSource
from csi_vduse.config import AgentConfig
from csi_vduse.dataplane.worker import run_worker
from csi_vduse.vdpa.bus import VdpaBus
from csi_vduse.vdpa.helper_client import NetlinkHelper
from csi_vduse.vdpa.sysfs import Sysfs

if TYPE_CHECKING:
    from csi_vduse.agent.process import Companion


def run_under_spawner(config: AgentConfig, make_companion: Callable[[], Companion] | None = None) -> int:
    """Become the spawner; its child runs the agent, and beside it what `make_companion` makes there."""

    def agent_main(sock: socket.socket) -> int:
        from csi_vduse.agent.process import run_agent  # noqa: PLC0415 - the child's own, see above

        return run_agent(config, sock, make_companion() if make_companion is not None else None)

    return run_spawner(
        agent_main, run_worker, vacant=lambda: is_vacant(config.run_dir), stay=config.take_over
    )


@asynccontextmanager
async def node_with(config: AgentConfig, spawner: WorkerSource, store: Store) -> AsyncIterator[Node]:
    """Give attach and detach this machine's kernel and bus to act on, without an agent."""
    config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    sysfs = Sysfs()
    netlink = NetlinkHelper(config.run_dir)
    try:
        yield Node(
            config=config,
            kernel=VduseKernel(destroy_timeout_s=config.step_timeout_s),
            bus=VdpaBus(netlink, sysfs),
            sysfs=sysfs,
            spawner=spawner,
            store=store,
        )
    finally:
        await netlink.close()
