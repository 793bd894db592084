"""The agent's process: puts the parts together, serves until told to stop, leaves the workers serving.

Kept true: one agent per run directory (takeover.py); whoever starts the
agent hears that it is ready only when earlier attachments are taken over and the socket answers.
"""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from pathlib import Path

from csi_vduse import log
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.kernel import VduseKernel
from csi_vduse.agent.model import VolumeStats, count_states, device_name
from csi_vduse.agent.server import start_server
from csi_vduse.agent.store import Store
from csi_vduse.agent.takeover import hand_over_workers, only_agent
from csi_vduse.agent.workers import SpawnerClient
from csi_vduse.config import AgentConfig, check_socket_path
from csi_vduse.errors import FailedPrecondition, VduseError
from csi_vduse.vdpa.bus import VdpaBus
from csi_vduse.vdpa.helper_client import NetlinkHelper
from csi_vduse.vdpa.sysfs import Sysfs

# What runs beside the agent in the same process, such as the CSI services in standalone mode.
Companion = Callable[[AgentClient], AbstractAsyncContextManager[None]]

_DESTROY_TIMEOUT_S = 10.0
_GRACE_S = 10.0
_SCRAPE_TIMEOUT_S = 15.0


def run_agent(config: AgentConfig, spawner: socket.socket, companion: Companion | None = None) -> int:
    """Run the agent until SIGTERM, SIGINT or the end of the spawner; return the exit code.

    Args:
        config: what it is told.
        spawner: our end of the spawner's channel.
        companion: entered when the agent answers, left before it stops.
    """
    try:
        asyncio.run(_serve(config, spawner, companion))
    except VduseError as error:
        log.get().error("cannot start", error=error.message, hint=error.hint)
        return 1
    return 0


async def _serve(config: AgentConfig, spawner_socket: socket.socket, companion: Companion | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        _make_run_dir(config.run_dir)
        if config.ready_file is not None:
            _not_ready(config.ready_file)
        await stack.enter_async_context(only_agent(config))
        spawner = SpawnerClient(spawner_socket, stop.set)
        stack.push_async_callback(spawner.close)
        netlink = NetlinkHelper(config.run_dir)
        stack.push_async_callback(netlink.close)
        warm_up = asyncio.create_task(_warm_up(netlink))
        stack.callback(warm_up.cancel)
        sysfs = Sysfs()
        node = Node(
            config=config,
            kernel=VduseKernel(destroy_timeout_s=_DESTROY_TIMEOUT_S),
            bus=VdpaBus(netlink, sysfs),
            sysfs=sysfs,
            spawner=spawner,
            store=Store(config.run_dir / "volumes"),
        )
        agent = Agent(node, exit_code=spawner.exit_code)
        stack.push_async_callback(agent.close)
        await agent.recover()
        agent.watch()
        server = await start_server(agent, config.socket_path)
        stack.push_async_callback(server.stop, _GRACE_S)
        if config.metrics_address is not None:
            stack.callback(_serve_metrics(config.metrics_address, agent))
        if companion is not None:
            client = AgentClient(config.socket_path)
            stack.push_async_callback(client.close)
            await stack.enter_async_context(companion(client))
        spawner.report_ready()
        getting_ready = asyncio.create_task(_get_ready(config, agent))
        stack.callback(getting_ready.cancel)
        if await _first(stop, agent.left) is agent.left:
            spawner.report_leaving()
            log.get().info("leaving to another agent; workers go on serving")
        else:
            log.get().info("stopping; workers go on serving")


async def _get_ready(config: AgentConfig, agent: Agent) -> None:
    """Take over what has to be, and tell that we are ready."""
    if config.take_over and (left := await hand_over_workers(agent)):
        log.get().error(
            "these volumes keep the other agent's workers; when those end they are revived", volumes=left
        )
    if config.ready_file is not None:
        config.ready_file.touch()
    log.get().info("ready", socket=str(config.socket_path), problems=list(agent.probe().problems))


def _not_ready(ready_file: Path) -> None:
    try:
        ready_file.parent.mkdir(parents=True, exist_ok=True)
        ready_file.unlink(missing_ok=True)
    except OSError as error:
        raise FailedPrecondition(f"ready file {ready_file} cannot be made: {error.strerror}") from error


async def _first(*events: asyncio.Event) -> asyncio.Event:
    """Wait for any of some events; return the first of those that are set."""
    waiting = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    for task in waiting:
        task.cancel()
    return next(event for event in events if event.is_set())


async def _warm_up(netlink: NetlinkHelper) -> None:
    """Start the helper ahead of the first attach, which would wait for its imports otherwise."""
    try:
        await netlink.start()
    except VduseError as error:
        log.get().warning("the netlink helper did not start; the first attach tries again", error=str(error))


def _make_run_dir(run_dir: Path) -> None:
    # Workers listen below it; this one's name is as long as those of volumes that CSI made.
    check_socket_path(Store(run_dir / "volumes").control_path(device_name("")))
    try:
        run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise FailedPrecondition(f"run directory {run_dir} cannot be made: {error.strerror}") from error


def _serve_metrics(address: str, agent: Agent) -> Callable[[], None]:
    # Here, because importing the HTTP server is slow and most agents have no such address.
    from csi_vduse import metrics  # noqa: PLC0415

    loop = asyncio.get_running_loop()

    def read() -> tuple[list[VolumeStats], dict[str, int]]:
        future = asyncio.run_coroutine_threadsafe(agent.stats(), loop)
        states = count_states(attachment.state for attachment in agent.attachments())
        return future.result(_SCRAPE_TIMEOUT_S), states

    return metrics.serve(address, read)
