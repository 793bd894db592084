"""Ends workers that do not answer any more, stopped or stuck, before the kernel gives their devices up.

A worker has msg_timeout (30 s) for the answer to a control message, and a device that misses one is lost for good.
A worker that is killed in time is replaced, and the kernel asks its successor: all that the application sees is a pause.

Kept true: whoever is killed has had longer than a healthy worker can be busy (a drain, 5 s and a little for each
queue), and what is left of msg_timeout is enough to start another one, whatever the other workers do. He is asked twice:
where the whole machine stood still, the first answer is late for both. A worker that sleeps until something comes is
well, and is not asked: an idle volume costs no processor time.
"""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Final

from csi_vduse import log
from csi_vduse.agent.attachments import Attachments
from csi_vduse.agent.workers import Worker
from csi_vduse.errors import DeadlineExceeded, VduseError

PAUSE_S: Final = 3.0
ANSWER_TIMEOUT_S: Final = 12.0
SECOND_TIMEOUT_S: Final = 3.0
# Where epoll_wait(2) sleeps (fs/eventpoll.c): which of them depends on what the compiler inlined.
_WAITING: Final = frozenset({"do_epoll_wait", "ep_poll"})


def is_waiting(pid: int) -> bool:
    """Whether a process sleeps in its selector: nothing has come that it has not taken up (proc(5), /proc/PID/wchan).

    False also where the kernel does not tell.
    """
    try:
        return Path(f"/proc/{pid}/wchan").read_text() in _WAITING
    except OSError:
        return False


class Watchdog:
    """Looks at every worker of these volumes, again and again, until closed."""

    def __init__(self, volumes: Attachments) -> None:
        self._volumes = volumes
        self._asked: dict[Worker, asyncio.Task[None]] = {}
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def close(self) -> None:
        """Stop asking."""
        tasks = [self._task, *self._asked.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(PAUSE_S)
            for volume_id, worker in self._volumes.workers.items():
                if worker not in self._asked:
                    self._asked[worker] = asyncio.get_running_loop().create_task(self._ask(volume_id, worker))

    async def _ask(self, volume_id: str, worker: Worker) -> None:
        try:
            if is_waiting(worker.pid) or await self._answers(worker):
                return
            log.get().error("a worker does not answer; it is killed", volume_id=volume_id, pid=worker.pid)
            worker.shoot()
        finally:
            del self._asked[worker]

    async def _answers(self, worker: Worker) -> bool:
        for timeout_s in (ANSWER_TIMEOUT_S, SECOND_TIMEOUT_S):
            try:
                await worker.call({"op": "ping"}, timeout_s=timeout_s)
            except DeadlineExceeded:
                continue
            except VduseError:
                pass  # it is dead already, which others see to
            return True
        return False
