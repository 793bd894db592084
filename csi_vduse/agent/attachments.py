"""What the agent knows of the volumes of its node: attachment, living worker, and whether an operation has it.

Kept true: one operation at a time has a volume; a worker's death is known at once, and the reviver is told of it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any

from csi_vduse import log
from csi_vduse.agent.attach import Node, set_capacity, set_msg_timeout, set_throttle, start_worker
from csi_vduse.agent.model import Attachment, AttachSpec, State, device_name
from csi_vduse.agent.revive import Reviver
from csi_vduse.agent.workers import Worker, find_serving
from csi_vduse.errors import DeviceBroken, NotFound, Pending, VduseError

ASK_TIMEOUT_S = 10.0


class Attachments:
    """The volumes of this node; see Agent for the arguments."""

    def __init__(self, node: Node, *, exit_code: Callable[[int], int | None]) -> None:
        self._node = node
        self._exit_code = exit_code
        self.known: dict[str, Attachment] = {}
        self.workers: dict[str, Worker] = {}
        self._in_operation: set[str] = set()
        self._in_revival: set[str] = set()
        self.broken: set[str] = set()
        # What requests wait for, as the workers said when they were last asked.
        self._waits: dict[str, str] = {}
        self.reviver = Reviver(self._serve_again)
        self.on_hold: Callable[[str, Worker], None] = lambda _volume_id, _worker: None

    def require(self, volume_id: str) -> Attachment:
        """Return an attachment as it was last recorded.

        Raises:
            NotFound: there is none.
        """
        attachment = self.known.get(volume_id)
        if attachment is None:
            raise NotFound(f"volume {volume_id} is not attached on this node")
        return attachment

    def record(self, attachment: Attachment) -> None:
        """Remember what an attachment is now, beyond our own end."""
        self._node.store.save(attachment)
        self.known[attachment.volume_id] = attachment

    def current(self, volume_id: str) -> Attachment:
        """The attachment with what is known of its worker now."""
        attachment, worker = self.known[volume_id], self.workers.get(volume_id)
        lives = worker is not None and worker.alive and volume_id not in self.broken
        if attachment.state is not State.ATTACHED or lives:
            hello = worker.hello if worker is not None else None
            return replace(
                attachment,
                worker_pid=worker.pid if worker is not None else 0,
                worker_version=hello.version if hello is not None else "",
                state_reason=(lives and self._waits.get(volume_id)) or attachment.state_reason,
            )
        if volume_id in self.broken:
            return replace(
                attachment,
                state=State.BROKEN,
                state_reason="the kernel gave the device up: detach the volume and attach it again",
            )
        stalled = self.reviver.stalled(volume_id)
        code = self._exit_code(attachment.worker_pid)
        reason = self.reviver.reason(volume_id)
        how = "" if code is None else f" (killed by signal {-code})" if code < 0 else f" (exit code {code})"
        return replace(
            attachment,
            state=State.STALLED if stalled else State.WORKER_DEAD,
            state_reason=f"worker {attachment.worker_pid} is dead{how}; I/O waits. {reason}".rstrip(),
            worker_pid=0,
        )

    def is_busy(self, volume_id: str) -> bool:
        """Whether an operation, or the reviver, has a volume."""
        return volume_id in self._in_operation or volume_id in self._in_revival

    @asynccontextmanager
    async def alone(self, volume_id: str, *, instead_of_reviver: bool = False) -> AsyncIterator[None]:
        """Have a volume for an operation; Pending if another one has it.

        instead_of_reviver: the operation gives the volume the worker that it needs, so the reviver is stopped, and what
            it began is undone. One that is Pending leaves the reviver alone.
        """
        if volume_id in self._in_operation or (volume_id in self._in_revival and not instead_of_reviver):
            raise Pending(f"another operation on volume {volume_id} is under way", hint="retry")
        self._in_operation.add(volume_id)
        try:
            if instead_of_reviver:
                await self.reviver.stop(volume_id)
            yield
        finally:
            self._in_operation.discard(volume_id)

    def hold(self, volume_id: str, worker: Worker) -> None:
        """Take a worker for the one that serves a volume, and see to it that its death is known."""

        def ended(dead: Worker) -> None:
            if self.workers.get(volume_id) is dead:
                del self.workers[volume_id]
            dead.close()
            log.get().error("a worker died; I/O of its volume waits", volume_id=volume_id, pid=dead.pid)
            self.reviver.worker_died(volume_id)

        self.workers[volume_id] = worker
        self._waits.pop(volume_id, None)
        worker.on_exit = ended
        if not worker.alive:
            ended(worker)
        else:
            self.on_hold(volume_id, worker)

    async def find_worker(self, attachment: Attachment) -> Worker | None:
        """Find the worker that an earlier agent left, and hold it."""
        name = attachment.device_name
        worker = await find_serving(
            self._node.store.control_path(name), self._node.store.next_control_path(name)
        )
        if worker is not None:
            self.hold(attachment.volume_id, worker)
        return worker

    async def adopt(self, attachment: Attachment) -> None:
        """Take over a volume that an earlier agent attached: its worker, or if none serves, another one."""
        self.known[attachment.volume_id] = attachment
        try:
            worker = await self.find_worker(attachment)
        except (VduseError, OSError):
            # If there is one after all, nobody can start another before it ends.
            self.reviver.worker_died(attachment.volume_id)
            raise
        if worker is None:
            self.reviver.worker_died(attachment.volume_id)
            return
        with contextlib.suppress(VduseError):
            set_msg_timeout(self._node, attachment.spec)  # a shutdown that did not happen shortened it
        if worker.hello is None:
            return  # it does not answer; we do not wait for it
        # The last agent may have died between a record and its worker.
        with contextlib.suppress(VduseError):
            await set_throttle(self._node, worker, attachment.spec.throttle)
        with contextlib.suppress(VduseError):
            stats = await worker.call({"op": "stats"}, timeout_s=ASK_TIMEOUT_S)
            if stats.get("capacity_bytes") != attachment.spec.capacity_bytes:
                await set_capacity(self._node, worker, attachment.spec.capacity_bytes)

    async def _serve_again(self, volume_id: str) -> None:
        """Start another worker for a volume whose worker died; see Reviver."""
        if self.is_busy(volume_id):
            raise Pending(f"an operation on volume {volume_id} is under way")
        attachment = self.known.get(volume_id)
        if attachment is None or attachment.state is not State.ATTACHED or volume_id in self.workers:
            return
        started = time.monotonic()
        self._in_revival.add(volume_id)
        try:
            await self._start_again(attachment)
        except DeviceBroken:
            self.broken.add(volume_id)  # after the undo: who sees it may detach at once
            raise
        finally:
            self._in_revival.discard(volume_id)
        log.get().info(
            "served again",
            volume_id=volume_id,
            worker_pid=self.known[volume_id].worker_pid,
            seconds=round(time.monotonic() - started, 3),
        )

    async def _start_again(self, attachment: Attachment) -> None:
        async with AsyncExitStack() as undo:
            attachment, worker = await start_worker(
                self._node, attachment, undo, resume=True, limits=attachment.spec.throttle
            )
            undo.pop_all()
        self.hold(attachment.volume_id, worker)
        self.record(replace(attachment, worker_pid=worker.pid))

    async def ask(self, volume_id: str) -> dict[str, Any] | None:
        """Return what the worker of a volume counts, or None if none answers."""
        worker = self.workers.get(volume_id)
        if worker is None:
            return None
        try:
            answer = await worker.call({"op": "stats"}, timeout_s=ASK_TIMEOUT_S)
        except VduseError as error:
            log.get().warning("a worker does not answer", volume_id=volume_id, error=str(error))
            return None
        self._waits[volume_id] = str(answer.get("waiting", ""))
        if answer.get("broken") and volume_id not in self.broken:
            self.broken.add(volume_id)
            log.get().error("the kernel gave a device up", volume_id=volume_id)
        return answer

    def forget(self, volume_id: str) -> None:
        """Forget a volume that is no longer attached."""
        del self.known[volume_id]
        self.workers.pop(volume_id, None)
        self.broken.discard(volume_id)
        self.reviver.forget(volume_id)

    def settle(self, spec: AttachSpec) -> None:
        """After a failed attach: forget it, unless its undo failed too, which left a record for detach."""
        self.known.pop(spec.volume_id, None)
        attachment = self._node.store.find(spec.device_name)
        if attachment is not None:
            self.known[spec.volume_id] = attachment

    def take_stock(self, volume_id: str) -> None:
        """Take stock of a volume after a detach or handover that failed: is there a worker, and what is recorded."""
        worker = self.workers.pop(volume_id, None)
        if worker is not None:
            if worker.alive:
                self.hold(volume_id, worker)
            else:
                worker.close()
        try:
            attachment = self._node.store.find(device_name(volume_id))
        except (VduseError, OSError) as error:
            log.get().error("the record of a volume cannot be read", volume_id=volume_id, error=str(error))
            attachment = self.known[volume_id]
        if attachment is not None:
            self.known[volume_id] = attachment
            if attachment.state is State.ATTACHED and volume_id not in self.workers:
                self.reviver.worker_died(volume_id)
