"""Carries out the plan of recovery.py when an agent starts, and tries again what could not be finished then.

Kept true: a step that fails or hangs does not keep the others, or the start of the agent, waiting.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from csi_vduse import log
from csi_vduse.agent.attach import Node
from csi_vduse.agent.attachments import Attachments
from csi_vduse.agent.model import HALF_WAY
from csi_vduse.agent.recovery import Adopt, Destroy, Finish, Forget, Step, observe, plan
from csi_vduse.agent.workers import end_workers
from csi_vduse.errors import VduseError

COLLECT_PAUSE_S = 15.0
_FINISH_AT_ONCE_S = 10.0


class Recovery:
    """What earlier agents left.

    Args:
        node: what steps act on.
        volumes: what is adopted goes there.
        detach: the agent's, for one volume.
    """

    def __init__(self, node: Node, volumes: Attachments, detach: Callable[[str], Awaitable[None]]) -> None:
        self._node = node
        self._volumes = volumes
        self._detach = detach
        self._leftovers: set[str] = set()
        self._collecting: asyncio.Task[None] | None = None

    async def run(self) -> None:
        """Observe, plan, apply; what is half-way is finished later if that takes longer than a moment."""
        for step in plan(observe(self._node.store, self._node.sysfs)):
            if not isinstance(step, Adopt):
                log.get().warning("recovery", step=str(step))
            try:
                await self._apply(step)
            except (VduseError, OSError) as error:
                log.get().error("recovery goes on without this", step=str(step), error=str(error))
        if self._leftovers:
            self._collecting = asyncio.get_running_loop().create_task(self._collect())
            await asyncio.wait({self._collecting}, timeout=_FINISH_AT_ONCE_S)

    def close(self) -> None:
        """Leave the rest to the next agent."""
        if self._collecting is not None:
            self._collecting.cancel()

    async def _apply(self, step: Step) -> None:
        match step:
            case Adopt(attachment):
                await self._volumes.adopt(attachment)
            case Finish(attachment):
                self._volumes.known[attachment.volume_id] = attachment
                self._leftovers.add(attachment.volume_id)  # whatever comes of the search for its worker
                await self._volumes.find_worker(attachment)
            case Forget(name):
                store = self._node.store
                await end_workers(store.control_path(name), store.next_control_path(name))
                store.forget(name)
            case Destroy(name):
                await self._node.kernel.destroy(name)

    async def _collect(self) -> None:
        """Remove what is half-way, again and again: nobody else may ask for it any more."""
        while True:
            for volume_id in sorted(self._leftovers):
                try:
                    await self._remove(volume_id)
                except (VduseError, OSError) as error:
                    log.get().error("a leftover cannot be removed yet", volume_id=volume_id, error=str(error))
            if not self._leftovers:
                return
            await asyncio.sleep(COLLECT_PAUSE_S)

    async def _remove(self, volume_id: str) -> None:
        if self._volumes.is_busy(volume_id):
            return  # somebody attaches or detaches it: we look again at what comes of that
        attachment = self._volumes.known.get(volume_id)
        if attachment is not None and attachment.state in HALF_WAY:
            await self._detach(volume_id)
        self._leftovers.discard(volume_id)
