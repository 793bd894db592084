"""Giving volumes whose worker died another one: at once the first time, ever more slowly if that does not help.

Kept true: I/O of such a volume waits and never fails, however long it takes; and people can read what it waits for.
A worker that dies again at once, even before anybody could see that it served, is missed no less than the first.
A log that does not fit is not tried again: only people can decide what to do then.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from csi_vduse import log
from csi_vduse.errors import DataLoss, DeviceBroken, Pending, VduseError

# Seconds before the first, second ... attempt of a run of deaths; the last one repeats. It leaves a worker time to
# answer what the kernel asks meanwhile: a device that gets no answer within msg_timeout (30 s) is lost.
DELAYS_S = (0.0, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
# A worker that has served for so long ends the run: what it died of was not its start or what it had to replay.
CALM_S = 10.0
_BUSY_POLL_S = 0.05


class Reviver:
    """The volumes that wait for a worker.

    Args:
        start: gives a volume a worker, unless it needs none any more. Raises Pending while another operation
            has the volume, and otherwise why it failed: VduseError or OSError.
    """

    def __init__(self, start: Callable[[str], Awaitable[None]]) -> None:
        self._start = start
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._deaths: dict[str, int] = {}
        self._serves_since: dict[str, float] = {}
        self._died_again: set[str] = set()
        self._reasons: dict[str, str] = {}
        self._hopeless: set[str] = set()

    def worker_died(self, volume_id: str) -> None:
        """Begin to look for another worker, unless somebody does already."""
        if volume_id in self._tasks:
            # The worker that was just found, while its finder has not ended yet.
            self._died_again.add(volume_id)
            return
        if time.monotonic() - self._serves_since.get(volume_id, -CALM_S) >= CALM_S:
            self._deaths[volume_id] = 0
        self._tasks[volume_id] = asyncio.get_running_loop().create_task(self._revive(volume_id))

    def reason(self, volume_id: str) -> str:
        """Return what keeps a volume without a worker, for people."""
        return self._reasons.get(volume_id, "")

    def stalled(self, volume_id: str) -> bool:
        """Whether a volume has no worker although everything short of the longest pause was tried, or none can help."""
        return volume_id in self._hopeless or self._deaths.get(volume_id, 0) >= len(DELAYS_S)

    def forget(self, volume_id: str) -> None:
        """Forget a volume that is no longer attached."""
        for known in (self._deaths, self._serves_since, self._reasons):
            known.pop(volume_id, None)
        self._hopeless.discard(volume_id)

    async def stop(self, volume_id: str) -> None:
        """Stop looking for a worker for one volume; what was begun is undone."""
        task = self._tasks.get(volume_id)
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
            if self._tasks.get(volume_id) is task:
                del self._tasks[volume_id]  # it had not begun, and so did not see to that

    async def close(self) -> None:
        """Stop looking; the next agent goes on."""
        for volume_id in list(self._tasks):
            await self.stop(volume_id)

    async def _revive(self, volume_id: str) -> None:
        try:
            while True:
                self._died_again.discard(volume_id)
                if await self._attempt(volume_id) and volume_id not in self._died_again:
                    return
        finally:
            self._tasks.pop(volume_id, None)

    async def _attempt(self, volume_id: str) -> bool:
        """Try once, after the pause that is due; returns whether that is all that can be done."""
        self._hopeless.discard(volume_id)
        attempt = self._deaths.get(volume_id, 0)
        self._deaths[volume_id] = attempt + 1
        await asyncio.sleep(DELAYS_S[min(attempt, len(DELAYS_S) - 1)])
        try:
            await self._start_when_free(volume_id)
        except (DataLoss, DeviceBroken) as error:
            self._reasons[volume_id] = str(error)
            self._hopeless.add(volume_id)
            log.get().error("a volume cannot be served again", volume_id=volume_id, error=str(error))
        except (VduseError, OSError) as error:  # want of descriptors or memory passes too
            self._reasons[volume_id] = str(error)
            log.get().warning(
                "no worker for a volume yet; its I/O waits",
                volume_id=volume_id,
                attempt=attempt + 1,
                error=str(error),
            )
            return False
        else:
            self._reasons.pop(volume_id, None)
            self._serves_since[volume_id] = time.monotonic()
        return True

    async def _start_when_free(self, volume_id: str) -> None:
        while True:
            try:
                await self._start(volume_id)
            except Pending:
                await asyncio.sleep(_BUSY_POLL_S)
            else:
                return
