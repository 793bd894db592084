"""An agent takes the place of another one that runs beside it, as in the surge upgrade of a DaemonSet.

The other agent ends its operations and leaves run directory and socket; its spawner and its workers stay. We adopt
the workers and hand each over to one forked by our own spawner, because the end of the other container is the end of
all that is in it. Only then are we ready, so that nobody ends that container too early.

Kept true: workers change hands one at a time; one that cannot be handed over serves on, and is tried again.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from csi_vduse import log
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.place import lock, open_place
from csi_vduse.config import AgentConfig
from csi_vduse.errors import FailedPrecondition, Unavailable, Unimplemented, VduseError

# The other agent may have an operation under way whose steps each may take a minute.
LEAVE_TIMEOUT_S = 300.0
# What has not changed hands by then dies with the other container, and is revived by us.
HANDOVERS_TIMEOUT_S = 600.0
_POLL_S = 0.2
_ROUND_PAUSE_S = 5.0


@asynccontextmanager
async def only_agent(config: AgentConfig) -> AsyncIterator[None]:
    """Be the one agent of the run directory, which is locked (place.py).

    Raises:
        FailedPrecondition: another agent has it, and we are not to take its place, or it does not leave.
    """
    fd = open_place(config.run_dir)
    try:
        deadline = time.monotonic() + LEAVE_TIMEOUT_S
        while not lock(fd):
            if not config.take_over or time.monotonic() > deadline:
                raise FailedPrecondition(
                    f"another agent uses the run directory {config.run_dir}",
                    hint="stop it, choose another directory, or take its place with --take-over",
                )
            await _ask_to_leave(config.socket_path)
            await asyncio.sleep(_POLL_S)
        yield
    finally:
        os.close(fd)


async def hand_over_workers(agent: Agent) -> list[str]:
    """Hand over all workers that are not of our spawner; return the volumes for which it did not work in time."""
    deadline = time.monotonic() + HANDOVERS_TIMEOUT_S
    await agent.stats()  # and so we know whose device is broken: nobody can serve that one any better
    total = len(agent.workers_of_other_programs())
    while left := agent.workers_of_other_programs():
        for volume_id in left:
            try:
                await agent.handover(volume_id)
            except VduseError as error:
                log.get().warning("not handed over yet", volume_id=volume_id, error=str(error))
            else:
                done = total - len(agent.workers_of_other_programs())
                log.get().info("taking over", volume_id=volume_id, done=done, total=total)
        if agent.workers_of_other_programs():
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_ROUND_PAUSE_S)
    return left


async def _ask_to_leave(socket_path: Path) -> None:
    client = AgentClient(socket_path)
    try:
        log.get().info("the other agent leaves", version=await client.leave())
    except Unimplemented as error:
        raise FailedPrecondition(
            "the other agent is of a release that cannot leave", hint="stop it"
        ) from error
    except Unavailable:
        pass  # it is starting, or is on its way
    finally:
        await client.close()
