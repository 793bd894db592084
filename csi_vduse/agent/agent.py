"""The agent: which volumes are attached on this node, and one operation at a time on each of them.

Kept true:
- What it knows is the records (store.py) compared with the kernel and with the living workers; it can be
  killed at any point and its successor goes on from there (`recover`).
- An operation that has begun is finished or undone even if its caller goes away.
- A worker's death is known at once and reported; I/O then waits, it does not fail.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from typing import Any, TypeVar

from csi_vduse import __version__, log
from csi_vduse.agent.attach import Node, attach, bounce_bytes_of, device_spec
from csi_vduse.agent.attachments import ASK_TIMEOUT_S, Attachments
from csi_vduse.agent.change import resize, throttle
from csi_vduse.agent.detach import detach
from csi_vduse.agent.growth import Growth
from csi_vduse.agent.handover import handover
from csi_vduse.agent.limits import this_machine, volume_limit
from csi_vduse.agent.model import (
    HALF_WAY,
    Attachment,
    AttachSpec,
    Bus,
    Handover,
    Inspection,
    Probe,
    State,
    VolumeStats,
    device_name,
    stats_from_json,
)
from csi_vduse.agent.processors import Processors
from csi_vduse.agent.recover import Recovery
from csi_vduse.agent.watchdog import Watchdog
from csi_vduse.dataplane import backend_spec, versions
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    InvalidArgument,
    Pending,
    ResourceExhausted,
    Unavailable,
    VduseError,
)

T = TypeVar("T")

_STOP_TIMEOUT_S = 20.0
_SHUTDOWN_MSG_TIMEOUT_S = 1
_MAX_DEFAULT_QUEUES = 4
# Longer would keep applications waiting beyond what people take for a hang.
MAX_HOLD_S = 300.0


def default_queues() -> int:
    """Queues of a device when nobody says how many: one for each processor, up to a few."""
    return min(_MAX_DEFAULT_QUEUES, os.cpu_count() or 1)


class Agent:
    """The attachments of this node.

    Args:
        node: what operations act on.
        exit_code: tells how a worker ended, if known.
    """

    def __init__(self, node: Node, *, exit_code: Callable[[int], int | None]) -> None:
        self._node = node
        self._max_volumes = node.config.max_volumes or volume_limit(this_machine(), queues=default_queues())
        self._volumes = Attachments(node, exit_code=exit_code)
        self._recovery = Recovery(node, self._volumes, self.detach)
        self._growth = Growth(self._volumes, self.resize)
        self._volumes.on_hold = self._growth.listen
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watchdog: Watchdog | None = None
        self._processors: Processors | None = None
        self._refusing = ""
        self._leaving = False
        self.left = asyncio.Event()

    async def recover(self) -> None:
        """Take over what earlier agents left; see recover.py."""
        await self._recovery.run()

    def watch(self) -> None:
        """End workers that do not answer, and see processors go, from now on; see watchdog.py and processors.py."""
        self._watchdog = Watchdog(self._volumes)
        known = self._volumes.known
        self._processors = Processors(self._node.sysfs, lambda: [each.device_name for each in known.values()])

    async def attach(self, spec: AttachSpec) -> Attachment:
        """Attach a volume; returns the existing attachment if it is the one asked for.

        Capacity and throttle are not compared: they change later, and a repeated request may carry older ones. What
        a failed attach or detach left half-way is removed first: nobody else may ask for that any more.

        Raises:
            AlreadyExists: attached with other settings, or a foreign device has the name.
            ResourceExhausted: the node has its maximum of volumes.
            Unavailable: attached, but its worker is dead.
            FailedPrecondition, DeadlineExceeded: as the detach of what was half-way said.
        """
        if self._refusing:
            raise Unavailable(f"no volume is attached any more: {self._refusing}")
        spec = spec.with_defaults(queues=default_queues())
        device_spec(spec)  # refuses an impossible geometry
        return await self._finish(self._attach(spec))

    async def detach(self, volume_id: str, *, force: bool = False) -> None:
        """Detach a volume; fine if it is not attached. See detach.py for what it raises, and for force."""
        await self._finish(self._detach(volume_id, force=force))

    async def resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        """Tell the driver about a capacity that the backend has already; returns when the disk shows it.

        Raises:
            NotFound: not attached.
            OutOfRange: smaller than now, which no driver survives.
            DeadlineExceeded: the driver did not take it up.
        """
        return await self._finish(self._resize(volume_id, capacity_bytes))

    async def throttle(self, volume_id: str, limits: Throttle) -> Attachment:
        """Change how fast a volume may be, at once. A volume without a living worker has it with its next one.

        Raises:
            NotFound: not attached.
        """
        return await self._finish(self._throttle(volume_id, limits))

    def attachments(self) -> list[Attachment]:
        """Return every attachment, by volume id."""
        return [self._volumes.current(volume_id) for volume_id in sorted(self._volumes.known)]

    async def inspect(self, volume_id: str) -> Inspection:
        """Return one attachment with what its worker says.

        Raises:
            NotFound: not attached.
        """
        self._volumes.require(volume_id)
        answer = await self._volumes.ask(volume_id)
        self._volumes.require(volume_id)  # it may have been detached meanwhile
        attachment = self._volumes.current(volume_id)
        if answer is None:
            return Inspection(attachment, None, 0, 0)
        return Inspection(
            attachment,
            _stats(attachment.spec, answer),
            int(answer.get("features", 0)),
            int(answer.get("device_status", 0)),
        )

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        """Stop taking requests for at most hold_s, and wait for those in flight; fine if not attached.

        Raises:
            InvalidArgument: hold_s is not above 0 and at most 300.
            Unavailable: the worker is dead.
            Pending: another operation is under way: its end may give the volume another worker, which holds nothing.
        """
        if not 0 < hold_s <= MAX_HOLD_S:
            raise InvalidArgument(
                f"cannot hold requests for {hold_s:g} s", hint=f"use up to {MAX_HOLD_S:g} s"
            )
        if self._volumes.is_busy(volume_id):
            raise Pending(f"another operation on volume {volume_id} is under way", hint="retry")
        worker = self._volumes.workers.get(volume_id)
        if worker is not None:
            await worker.call({"op": "quiesce", "hold_s": hold_s}, timeout_s=ASK_TIMEOUT_S)
        elif volume_id in self._volumes.known:
            raise Unavailable(f"the worker of volume {volume_id} is dead; its image is not a consistent cut")

    async def resume(self, volume_id: str) -> None:
        """Take requests again; fine if not attached."""
        worker = self._volumes.workers.get(volume_id)
        if worker is not None:
            await worker.call({"op": "resume"}, timeout_s=ASK_TIMEOUT_S)

    async def handover(self, volume_id: str) -> Handover:
        """Replace the living worker of a volume by a new one; see handover.py.

        Raises:
            NotFound: not attached.
            FailedPrecondition, Unavailable, Pending: it cannot be now; the old worker serves as before.
        """
        return await self._finish(self._handover(volume_id))

    async def stats(self) -> list[VolumeStats]:
        """Return the counters of every living worker."""
        volume_ids = sorted(self._volumes.workers)
        answers = await asyncio.gather(*(self._volumes.ask(volume_id) for volume_id in volume_ids))
        return [
            _stats(self._volumes.known[volume_id].spec, answer)
            for volume_id, answer in zip(volume_ids, answers, strict=True)
            if answer is not None and volume_id in self._volumes.known
        ]

    def probe(self) -> Probe:
        """Return whether this node can attach volumes."""
        problems = []
        if not (self._node.sysfs.roots.dev / "vduse/control").exists():
            problems.append("/dev/vduse/control does not exist: modprobe vduse")
        problems += [
            f"vDPA bus driver {bus} is not loaded: modprobe {bus}"
            for bus in Bus
            if not self._node.sysfs.has_driver(bus)
        ]
        problems += [problem for problem in [self._node.kernel.problem()] if problem]
        return Probe(__version__, not problems, tuple(problems), self._max_volumes)

    def workers_of_other_programs(self) -> list[str]:
        """Volumes whose living worker was not forked from where we were: it can end without ours. Not broken ones."""
        return sorted(
            volume_id
            for volume_id, worker in self._volumes.workers.items()
            if (worker.hello is None or worker.hello.image != versions.IMAGE)
            and volume_id not in self._volumes.broken
        )

    async def leave(self) -> None:
        """Take no more operations, let those that run end, and tell `left`: another agent takes our place."""
        self._leaving = True
        await self._settle_down()
        self.left.set()

    async def shut_down(self, timeout_s: float) -> dict[str, str]:
        """Prepare for the node's shutdown: see agent.proto. Returns why each volume is still attached, or "".

        timeout_s: for all detaches together; what is not done by then goes on, and counts as attached.
        """
        self._refusing = "the node shuts down"
        volume_ids = sorted(self._volumes.known)
        detaching = {
            volume_id: asyncio.ensure_future(self._finish(self._detach(volume_id, force=False)))
            for volume_id in volume_ids
        }
        for task in detaching.values():
            task.add_done_callback(self._done)
        if detaching:
            await asyncio.wait(detaching.values(), timeout=timeout_s)
        kept = {}
        for volume_id, task in detaching.items():
            error = task.exception() if task.done() else DeadlineExceeded("detaching it takes too long")
            kept[volume_id] = str(error) if error is not None else ""
            if error is not None:
                self._wait_less(volume_id)
        return kept

    def _wait_less(self, volume_id: str) -> None:
        """Have the kernel give a device up soon when it asks a worker that is gone: it does for each at shutdown."""
        with contextlib.suppress(VduseError):
            self._node.kernel.set_attribute(device_name(volume_id), "msg_timeout", _SHUTDOWN_MSG_TIMEOUT_S)

    async def close(self) -> None:
        """Let running operations end, and let go of the workers, which go on serving."""
        await self._settle_down()
        for worker in self._volumes.workers.values():
            worker.close()
        self._volumes.workers.clear()

    async def _settle_down(self) -> None:
        self._recovery.close()
        if self._watchdog is not None:
            await self._watchdog.close()
        if self._processors is not None:
            self._processors.close()
        await self._growth.close()
        await self._volumes.reviver.close()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _attach(self, spec: AttachSpec) -> Attachment:
        async with self._volumes.alone(spec.volume_id):
            existing = self._volumes.known.get(spec.volume_id)
            if existing is not None and existing.state in HALF_WAY:
                await self._remove(existing, force=False)
            elif existing is not None:
                return self._same(existing, spec)
            if len(self._volumes.known) >= self._max_volumes:
                raise ResourceExhausted(
                    f"this node has its maximum of {self._max_volumes} volumes attached",
                    hint="raise --max-volumes, or use another node",
                )
            self._volumes.known[spec.volume_id] = Attachment(spec, State.ATTACHING)
            started = time.monotonic()
            try:
                attachment, worker = await attach(self._node, spec)
            except BaseException:
                self._volumes.settle(spec)
                raise
            self._volumes.known[spec.volume_id] = attachment
            self._volumes.hold(spec.volume_id, worker)
            log.get().info(
                "attached",
                volume_id=spec.volume_id,
                path=str(attachment.path),
                worker_pid=worker.pid,
                seconds=round(time.monotonic() - started, 3),
            )
            return self._volumes.current(spec.volume_id)

    async def _detach(self, volume_id: str, *, force: bool) -> None:
        async with self._volumes.alone(volume_id, instead_of_reviver=True):
            attachment = self._volumes.known.get(volume_id)
            if attachment is not None:
                await self._remove(attachment, force=force)

    async def _remove(self, attachment: Attachment, *, force: bool) -> None:
        volume_id = attachment.volume_id
        worker = self._volumes.workers.get(volume_id)
        if worker is not None:
            worker.on_exit = None
        try:
            adopt = functools.partial(self._volumes.workers.__setitem__, volume_id)
            await detach(self._node, attachment, worker, adopt=adopt, force=force)
        except BaseException:
            self._volumes.take_stock(volume_id)
            raise
        self._volumes.forget(volume_id)
        log.get().info("detached", volume_id=volume_id)

    async def _resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        async with self._volumes.alone(volume_id):
            await resize(self._node, self._volumes, volume_id, capacity_bytes)
            return self._volumes.current(volume_id)

    async def _throttle(self, volume_id: str, limits: Throttle) -> Attachment:
        async with self._volumes.alone(volume_id):
            await throttle(self._node, self._volumes, volume_id, limits)
            return self._volumes.current(volume_id)

    async def _handover(self, volume_id: str) -> Handover:
        async with self._volumes.alone(volume_id):
            attachment, old = self._volumes.require(volume_id), self._volumes.workers.get(volume_id)
            state = self._volumes.current(volume_id).state
            if old is None or state is not State.ATTACHED:
                raise Unavailable(
                    f"volume {volume_id} is {state}: it has no worker that could hand it over",
                    hint="a dead worker is replaced by itself",
                )
            try:
                attachment, new, pause_s = await handover(self._node, attachment, old)
            except BaseException:
                self._volumes.take_stock(volume_id)
                raise
            self._volumes.hold(volume_id, new)
            self._volumes.record(replace(attachment, worker_pid=new.pid))
            old.on_exit = None
            await old.stop(timeout_s=_STOP_TIMEOUT_S)
            log.get().info(
                "handed over",
                volume_id=volume_id,
                worker_pid=new.pid,
                old_worker_pid=old.pid,
                pause_s=round(pause_s, 3),
            )
            return Handover(self._volumes.current(volume_id), pause_s)

    def _same(self, existing: Attachment, spec: AttachSpec) -> Attachment:
        current = self._volumes.current(existing.volume_id)
        if replace(existing.spec, capacity_bytes=spec.capacity_bytes, throttle=spec.throttle) != spec:
            raise AlreadyExists(
                f"volume {spec.volume_id} is attached with other settings: {existing.spec}",
                hint="detach it first",
            )
        if current.state is State.ATTACHED:
            return current
        raise Unavailable(
            f"volume {spec.volume_id} is attached but {current.state}: {current.state_reason}",
            hint="detach it, then attach it again",
        )

    async def _finish(self, operation: Coroutine[Any, Any, T]) -> T:
        """Await an operation; if the caller is cancelled the operation goes on to its end.

        Raises:
            Unavailable: we are leaving.
        """
        if self._leaving:
            operation.close()
            raise Unavailable("another agent takes the place of this one", hint="retry in a moment")
        task = asyncio.get_running_loop().create_task(operation)
        self._tasks.add(task)
        task.add_done_callback(self._done)
        awaitable: Awaitable[T] = asyncio.shield(task)
        return await awaitable

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            task.exception()  # seen: the caller may be gone


def _stats(spec: AttachSpec, answer: dict[str, Any]) -> VolumeStats:
    backend = str(backend_spec.to_json(spec.backend)["kind"])
    return stats_from_json(spec.volume_id, backend, answer, bounce_bytes=bounce_bytes_of(spec))
