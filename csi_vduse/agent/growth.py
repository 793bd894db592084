"""Volumes that grow with the disks of their vhost-user servers: the worker hears of it, the agent does it.

Kept true: a growth is recorded like one that somebody asked for, before the driver hears of it; a worker tells of it
again to each agent that asks, so that none is missed while there is no agent.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from csi_vduse import log
from csi_vduse.agent.attachments import ASK_TIMEOUT_S, Attachments
from csi_vduse.agent.workers import Worker
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.errors import Pending, VduseError

_BUSY_PAUSE_S: Final = 0.5


class Growth:
    """Listens to the workers of vhost-user volumes, until closed.

    Args:
        volumes: of this node.
        resize: as Agent.resize.
    """

    def __init__(self, volumes: Attachments, resize: Callable[[str, int], Awaitable[Any]]) -> None:
        self._volumes = volumes
        self._resize = resize
        self._tasks: set[asyncio.Task[None]] = set()

    def listen(self, volume_id: str, worker: Worker) -> None:
        """Listen to the worker that serves a volume from now on."""
        if isinstance(self._volumes.known[volume_id].spec.backend, VhostUserBackend):
            self._begin(self._listen(volume_id, worker))

    async def close(self) -> None:
        """Stop; growth that has begun is the agent's operation."""
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _listen(self, volume_id: str, worker: Worker) -> None:
        with contextlib.suppress(VduseError):  # it is dead, or of a version that tells nothing
            heard = functools.partial(self._heard, volume_id)
            await worker.report_to(heard, timeout_s=ASK_TIMEOUT_S)

    def _heard(self, volume_id: str) -> None:
        self._begin(self._follow(volume_id))

    async def _follow(self, volume_id: str) -> None:
        answer = await self._volumes.ask(volume_id)
        grown_bytes = int((answer or {}).get("grown_bytes", 0))
        while volume_id in self._volumes.known:
            if grown_bytes <= self._volumes.known[volume_id].spec.capacity_bytes:
                return
            try:
                await self._resize(volume_id, grown_bytes)
            except Pending:
                await asyncio.sleep(_BUSY_PAUSE_S)
            except VduseError as error:
                log.get().error("a volume does not grow with its disk", volume_id=volume_id, error=str(error))
                return

    def _begin(self, what: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(what)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
