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
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar

from csi_vduse import __version__, log
from csi_vduse.agent.attach import (
    Node,
    attach,
    bounce_bytes_of,
    device_spec,
    set_capacity,
    set_msg_timeout,
    set_throttle,
    start_worker,
)
from csi_vduse.agent.detach import detach
from csi_vduse.agent.handover import handover
from csi_vduse.agent.limits import this_machine, volume_limit
from csi_vduse.agent.model import (
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
from csi_vduse.agent.recovery import Adopt, Destroy, Finish, Forget, Step, observe, plan
from csi_vduse.agent.revive import Reviver
from csi_vduse.agent.workers import Worker, end_workers, find_serving
from csi_vduse.dataplane import backend_spec, versions
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Pending,
    ResourceExhausted,
    Unavailable,
    VduseError,
)

T = TypeVar("T")

_ASK_TIMEOUT_S = 10.0
_RESIZE_SEEN_TIMEOUT_S = 10.0
_POLL_S = 0.02
_STOP_TIMEOUT_S = 20.0
_COLLECT_PAUSE_S = 15.0
_SHUTDOWN_MSG_TIMEOUT_S = 1
_HALF_WAY = frozenset({State.ATTACHING, State.DETACHING})
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
        self._exit_code = exit_code
        self._max_volumes = node.config.max_volumes or volume_limit(this_machine(), queues=default_queues())
        self._attachments: dict[str, Attachment] = {}
        self._workers: dict[str, Worker] = {}
        self._busy: set[str] = set()
        self._broken: set[str] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reviver = Reviver(self._serve_again)
        self._leftovers: set[str] = set()
        self._collecting: asyncio.Task[None] | None = None
        self._refusing = ""
        self._leaving = False
        self.left = asyncio.Event()

    async def recover(self) -> None:
        """Take over what earlier agents left: adopt living workers, finish what was half-way; see recovery.py."""
        for step in plan(observe(self._node.store, self._node.sysfs)):
            if not isinstance(step, Adopt):
                log.get().warning("recovery", step=str(step))
            try:
                await self._recover(step)
            except VduseError as error:
                log.get().error("recovery goes on without this", step=str(step), error=str(error))
        if self._leftovers:
            self._collecting = asyncio.get_running_loop().create_task(self._collect())

    async def _collect(self) -> None:
        """Try again to remove what an earlier agent left half-way: nobody else may ask for it any more."""
        while self._leftovers:
            await asyncio.sleep(_COLLECT_PAUSE_S)
            for volume_id in sorted(self._leftovers):
                with contextlib.suppress(VduseError):
                    await self._remove_leftover(volume_id)

    async def _remove_leftover(self, volume_id: str) -> None:
        attachment = self._attachments.get(volume_id)
        if attachment is not None and attachment.state in _HALF_WAY:
            await self.detach(volume_id)
        self._leftovers.discard(volume_id)

    async def _recover(self, step: Step) -> None:
        match step:
            case Adopt(attachment):
                await self._adopt(attachment)
            case Finish(attachment):
                self._attachments[attachment.volume_id] = attachment
                await self._find_worker(attachment)
                self._leftovers.add(attachment.volume_id)
                await self._remove_leftover(attachment.volume_id)
            case Forget(name):
                await end_workers(
                    self._node.store.control_path(name), self._node.store.next_control_path(name)
                )
                self._node.store.forget(name)
            case Destroy(name):
                await self._node.kernel.destroy(name)

    async def _adopt(self, attachment: Attachment) -> None:
        self._attachments[attachment.volume_id] = attachment
        worker = await self._find_worker(attachment)
        if worker is None:
            self._reviver.worker_died(attachment.volume_id)
            return
        with contextlib.suppress(VduseError):
            set_msg_timeout(self._node, attachment.spec)  # a shutdown that did not happen shortened it
        # The last agent may have died between a record and its worker.
        with contextlib.suppress(VduseError):
            await set_throttle(self._node, worker, attachment.spec.throttle)
        with contextlib.suppress(VduseError):
            await set_capacity(self._node, worker, attachment.spec.capacity_bytes)

    async def _find_worker(self, attachment: Attachment) -> Worker | None:
        """Find the worker that an earlier agent left, and hold it."""
        name = attachment.device_name
        worker = await find_serving(
            self._node.store.control_path(name), self._node.store.next_control_path(name)
        )
        if worker is not None:
            self._hold(attachment.volume_id, worker)
        return worker

    async def attach(self, spec: AttachSpec) -> Attachment:
        """Attach a volume; returns the existing attachment if it is the one asked for.

        Capacity and throttle are not compared: they change later, and a repeated request may carry older ones.

        Raises:
            AlreadyExists: attached with other settings, or a foreign device has the name.
            ResourceExhausted: the node has its maximum of volumes.
            Unavailable: attached, but its worker is dead.
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

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        """Change how fast a volume may be, at once. A volume without a living worker has it with its next one.

        Raises:
            NotFound: not attached.
        """
        return await self._finish(self._throttle(volume_id, throttle))

    def attachments(self) -> list[Attachment]:
        """Return every attachment, by volume id."""
        return [self._current(volume_id) for volume_id in sorted(self._attachments)]

    async def inspect(self, volume_id: str) -> Inspection:
        """Return one attachment with what its worker says.

        Raises:
            NotFound: not attached.
        """
        self._require(volume_id)
        answer = await self._ask(volume_id)
        self._require(volume_id)  # it may have been detached meanwhile
        attachment = self._current(volume_id)
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
        if volume_id in self._busy:
            raise Pending(f"another operation on volume {volume_id} is under way", hint="retry")
        worker = self._workers.get(volume_id)
        if worker is not None:
            await worker.call({"op": "quiesce", "hold_s": hold_s}, timeout_s=hold_s + _ASK_TIMEOUT_S)
        elif volume_id in self._attachments:
            raise Unavailable(f"the worker of volume {volume_id} is dead; its image is not a consistent cut")

    async def resume(self, volume_id: str) -> None:
        """Take requests again; fine if not attached."""
        worker = self._workers.get(volume_id)
        if worker is not None:
            await worker.call({"op": "resume"}, timeout_s=_ASK_TIMEOUT_S)

    async def handover(self, volume_id: str) -> Handover:
        """Replace the living worker of a volume by a new one; see handover.py.

        Raises:
            NotFound: not attached.
            FailedPrecondition, Unavailable, Pending: it cannot be now; the old worker serves as before.
        """
        return await self._finish(self._handover(volume_id))

    async def stats(self) -> list[VolumeStats]:
        """Return the counters of every living worker."""
        volume_ids = sorted(self._workers)
        answers = await asyncio.gather(*(self._ask(volume_id) for volume_id in volume_ids))
        return [
            _stats(self._attachments[volume_id].spec, answer)
            for volume_id, answer in zip(volume_ids, answers, strict=True)
            if answer is not None and volume_id in self._attachments
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
        return Probe(__version__, not problems, tuple(problems), self._max_volumes)

    def workers_of_other_programs(self) -> list[str]:
        """Volumes whose living worker was not forked from where we were: their worker can end without ours."""
        return sorted(
            volume_id
            for volume_id, worker in self._workers.items()
            if worker.hello is None or worker.hello.image != versions.IMAGE
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
        volume_ids = sorted(self._attachments)
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
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()

    async def _settle_down(self) -> None:
        if self._collecting is not None:
            self._collecting.cancel()
        await self._reviver.close()
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _attach(self, spec: AttachSpec) -> Attachment:
        async with self._alone(spec.volume_id):
            existing = self._attachments.get(spec.volume_id)
            if existing is not None:
                return self._same(existing, spec)
            if len(self._attachments) >= self._max_volumes:
                raise ResourceExhausted(
                    f"this node has its maximum of {self._max_volumes} volumes attached",
                    hint="raise --max-volumes, or use another node",
                )
            self._attachments[spec.volume_id] = Attachment(spec, State.ATTACHING)
            started = time.monotonic()
            try:
                attachment, worker = await attach(self._node, spec)
            except BaseException:
                self._settle(spec)
                raise
            self._attachments[spec.volume_id] = attachment
            self._hold(spec.volume_id, worker)
            log.get().info(
                "attached",
                volume_id=spec.volume_id,
                path=str(attachment.path),
                worker_pid=worker.pid,
                seconds=round(time.monotonic() - started, 3),
            )
            return self._current(spec.volume_id)

    def _settle(self, spec: AttachSpec) -> None:
        """After a failed attach: forget it, unless its undo failed too, which left a record for detach."""
        self._attachments.pop(spec.volume_id, None)
        attachment = self._node.store.find(spec.device_name)
        if attachment is not None:
            self._attachments[spec.volume_id] = attachment

    async def _detach(self, volume_id: str, *, force: bool) -> None:
        await self._reviver.stop(volume_id)  # detach gives the volume the worker that it needs
        async with self._alone(volume_id):
            attachment = self._attachments.get(volume_id)
            if attachment is None:
                return
            worker = self._workers.get(volume_id)
            if worker is not None:
                worker.on_exit = None
            try:
                await detach(
                    self._node,
                    attachment,
                    worker,
                    adopt=lambda found: self._workers.__setitem__(volume_id, found),
                    force=force,
                )
            except BaseException:
                self._after_failure(volume_id)
                raise
            del self._attachments[volume_id]
            self._workers.pop(volume_id, None)
            self._broken.discard(volume_id)
            self._reviver.forget(volume_id)
            log.get().info("detached", volume_id=volume_id)

    def _after_failure(self, volume_id: str) -> None:
        """Take stock of a volume after a detach or handover that failed: is there a worker, and what is recorded."""
        worker = self._workers.pop(volume_id, None)
        if worker is not None:
            if worker.alive:
                self._hold(volume_id, worker)
            else:
                worker.close()
        attachment = self._node.store.find(device_name(volume_id))
        if attachment is not None:
            self._attachments[volume_id] = attachment
            if attachment.state is State.ATTACHED and volume_id not in self._workers:
                self._reviver.worker_died(volume_id)

    async def _resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        async with self._alone(volume_id):
            attachment = self._require(volume_id)
            spec = replace(attachment.spec, capacity_bytes=capacity_bytes)
            device_spec(spec)
            if capacity_bytes < attachment.spec.capacity_bytes:
                before = attachment.spec.capacity_bytes
                raise OutOfRange(f"volume {volume_id} of {before} bytes cannot shrink to {capacity_bytes}")
            worker = self._workers.get(volume_id)
            if worker is None:
                raise Unavailable(f"the worker of volume {volume_id} is dead")
            # Recorded first: a worker that knew less than its driver would refuse requests. More does no harm.
            grown = replace(attachment, spec=spec)
            self._node.store.save(grown)
            try:
                await set_capacity(self._node, worker, capacity_bytes)
            except FailedPrecondition:  # it refused: the driver has not heard of it
                self._node.store.save(attachment)
                raise
            self._attachments[volume_id] = grown
            await self._wait_for_capacity(grown)
            return self._current(volume_id)

    async def _throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        async with self._alone(volume_id):
            attachment = self._require(volume_id)
            attachment = replace(attachment, spec=replace(attachment.spec, throttle=throttle))
            self._node.store.save(attachment)
            self._attachments[volume_id] = attachment
            worker = self._workers.get(volume_id)
            if worker is not None:
                await set_throttle(self._node, worker, throttle)
            return self._current(volume_id)

    async def _handover(self, volume_id: str) -> Handover:
        async with self._alone(volume_id):
            attachment, old = self._require(volume_id), self._workers.get(volume_id)
            state = self._current(volume_id).state
            if old is None or state is not State.ATTACHED:
                raise Unavailable(
                    f"volume {volume_id} is {state}: it has no worker that could hand it over",
                    hint="a dead worker is replaced by itself",
                )
            try:
                new, pause_s = await handover(self._node, attachment, old)
            except BaseException:
                self._after_failure(volume_id)
                raise
            attachment = replace(attachment, worker_pid=new.pid)
            self._attachments[volume_id] = attachment
            self._hold(volume_id, new)
            self._node.store.save(attachment)
            old.on_exit = None
            await old.stop(timeout_s=_STOP_TIMEOUT_S)
            log.get().info(
                "handed over",
                volume_id=volume_id,
                worker_pid=new.pid,
                old_worker_pid=old.pid,
                pause_s=round(pause_s, 3),
            )
            return Handover(self._current(volume_id), pause_s)

    async def _wait_for_capacity(self, attachment: Attachment) -> None:
        """Wait for the driver, which takes the capacity up a moment after the interrupt."""
        if attachment.spec.bus is not Bus.VIRTIO:
            return
        deadline = time.monotonic() + _RESIZE_SEEN_TIMEOUT_S
        while True:
            seen = self._node.sysfs.disk_capacity_bytes(attachment.device_name)
            if seen is None or seen >= attachment.spec.capacity_bytes:
                return
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"{attachment.path} still has {seen} bytes instead of {attachment.spec.capacity_bytes}",
                    hint="retry; if it stays so, see the kernel log",
                )
            await asyncio.sleep(_POLL_S)

    def _same(self, existing: Attachment, spec: AttachSpec) -> Attachment:
        current = self._current(existing.volume_id)
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

    def _require(self, volume_id: str) -> Attachment:
        attachment = self._attachments.get(volume_id)
        if attachment is None:
            raise NotFound(f"volume {volume_id} is not attached on this node")
        return attachment

    def _current(self, volume_id: str) -> Attachment:
        """The attachment with what is known of its worker now."""
        attachment, worker = self._attachments[volume_id], self._workers.get(volume_id)
        lives = worker is not None and worker.alive and volume_id not in self._broken
        if attachment.state is not State.ATTACHED or lives:
            hello = worker.hello if worker is not None else None
            return replace(
                attachment,
                worker_pid=worker.pid if worker is not None else 0,
                worker_version=hello.version if hello is not None else "",
            )
        if volume_id in self._broken:
            return replace(
                attachment,
                state=State.BROKEN,
                state_reason="the kernel gave the device up: detach the volume and attach it again",
            )
        stalled = self._reviver.stalled(volume_id)
        code = self._exit_code(attachment.worker_pid)
        reason = self._reviver.reason(volume_id)
        how = "" if code is None else f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
        return replace(
            attachment,
            state=State.STALLED if stalled else State.WORKER_DEAD,
            state_reason=f"worker {attachment.worker_pid} is dead{how}; I/O waits. {reason}".rstrip(),
            worker_pid=0,
        )

    async def _ask(self, volume_id: str) -> dict[str, Any] | None:
        worker = self._workers.get(volume_id)
        if worker is None:
            return None
        try:
            answer = await worker.call({"op": "stats"}, timeout_s=_ASK_TIMEOUT_S)
        except VduseError as error:
            log.get().warning("a worker does not answer", volume_id=volume_id, error=str(error))
            return None
        if answer.get("broken") and volume_id not in self._broken:
            self._broken.add(volume_id)
            log.get().error("the kernel gave a device up", volume_id=volume_id)
        return answer

    def _hold(self, volume_id: str, worker: Worker) -> None:
        def ended(dead: Worker) -> None:
            if self._workers.get(volume_id) is dead:
                del self._workers[volume_id]
            dead.close()
            log.get().error("a worker died; I/O of its volume waits", volume_id=volume_id, pid=dead.pid)
            self._reviver.worker_died(volume_id)

        self._workers[volume_id] = worker
        worker.on_exit = ended
        if not worker.alive:
            ended(worker)

    async def _serve_again(self, volume_id: str) -> None:
        """Start another worker for a volume whose worker died; see Reviver."""
        async with self._alone(volume_id):
            attachment = self._attachments.get(volume_id)
            if attachment is None or attachment.state is not State.ATTACHED or volume_id in self._workers:
                return
            started = time.monotonic()
            async with AsyncExitStack() as undo:
                limits = attachment.spec.throttle
                worker = await start_worker(self._node, attachment.spec, undo, resume=True, limits=limits)
                undo.pop_all()
            attachment = replace(attachment, worker_pid=worker.pid)
            self._attachments[volume_id] = attachment
            self._hold(volume_id, worker)
            self._node.store.save(attachment)
            log.get().info(
                "served again",
                volume_id=volume_id,
                worker_pid=worker.pid,
                seconds=round(time.monotonic() - started, 3),
            )

    @asynccontextmanager
    async def _alone(self, volume_id: str) -> AsyncIterator[None]:
        if volume_id in self._busy:
            raise Pending(f"another operation on volume {volume_id} is under way", hint="retry")
        self._busy.add(volume_id)
        try:
            yield
        finally:
            self._busy.discard(volume_id)

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
