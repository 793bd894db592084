"""Cutting a copy of a volume that may be in use, at one point in time.

An attached volume of a file pool is held still by its worker while it is copied: requests wait, none fails. With shared
blocks that takes milliseconds; a full copy takes as long as the allocated bytes need, and is refused before anything
waits if that is longer than the pool allows. The hold ends by itself
if we die, a copy that outlives its hold is thrown away by the backend, and one whose worker did not outlive it
is not counted: the next worker knows of no hold. So no copy is ever a mixture of two times. Such a copy, and one of
a volume that is not attached, has the volume's lock: nobody attaches or detaches it meanwhile. A pool that copies what is
being written needs neither, so its copies hold up nobody.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from weakref import WeakValueDictionary

from csi_vduse import log
from csi_vduse.agent.model import Attachment, State
from csi_vduse.backends.base import Backend, Copying
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, Pending, Unavailable, VduseError
from csi_vduse.services.agent_port import Attachments
from csi_vduse.services.locks import Keys, LockTable
from csi_vduse.volumes.model import Snapshot, Volume

# How long copies may take: a fixed part and one for the bytes, at the speed of a slow disk.
_FIXED_S = 30.0
_BYTES_PER_S = 32 << 20
# The worker's hold outlasts our deadline by this, for the way of the message.
_HOLD_MARGIN_S = 5.0
# A volume that was held in vain is spared for so many times as long: callers try again by themselves, after
# seconds, and each try would stop the application for minutes.
_SPARED_FACTOR = 12
# Nobody waits for the copy of a detached volume, but a hanging disk must not keep it for ever.
_IDLE_FACTOR = 8
# Copies of one pool at once: those that threads of ours make, and those that a storage server makes.
_SLOTS = 4
_REMOTE_SLOTS = 16
_INSTEAD = "detach the volume first, or use a pool on XFS or btrfs, where copies share blocks"

Copy = Callable[[Copying], Awaitable[int]]
# After these a copy that its pool keeps may still be made, or be there.
_GOES_ON = (Unavailable, DeadlineExceeded, Pending, asyncio.CancelledError)


def goes_on(backend: Backend, error: BaseException) -> bool:
    """Tell whether a copy whose wait ended so is to be left for the next who asks, and not thrown away."""
    return backend.keeps_copies and isinstance(error, _GOES_ON)


class Copies:
    """Makes copies of volumes and snapshots, a bounded number of each pool at once.

    Args:
        agent: knows what is attached, and holds it still.
        locks: shared with the calls that attach and detach.
    """

    def __init__(self, agent: Attachments, locks: LockTable) -> None:
        self._agent = agent
        self._locks = locks
        self._spared_until_s: dict[str, float] = {}
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._under_way: dict[str, Copying] = {}

    def progress(self, target_id: str) -> tuple[int, int]:
        """Return how many bytes of how many the copy to a volume or snapshot has, about; zeros if none is known."""
        found = self._under_way.get(target_id)
        return (found.copied_bytes, found.total_bytes) if found is not None else (0, 0)

    async def of_volume(self, backend: Backend, volume: Volume, target_id: str, copy: Copy) -> int:
        """Copy a volume as it is at one moment; return that moment in nanoseconds since 1970.

        Args:
            backend: the volume's pool.
            volume: what is copied.
            target_id: of the volume or snapshot that is made.
            copy: does it, as Backend.clone.

        Raises:
            FailedPrecondition: an attached volume cannot be held still for as long as its copy takes, or could not a
                short time ago.
            Unavailable: the agent does not answer, so we do not know whether the volume is in use; or it has
                another worker than when its hold began.
            Pending: it is being attached or detached, or another copy has it.
        """
        if backend.needs_hold:
            async with self._slot(backend):
                with self._locks.having(Keys(frozenset({volume.id}))):
                    return await self._of_still(backend, volume, target_id, copy)
        # A storage server makes copies of one volume one after the other; those that wait take nobody's slot.
        turn = self._turns.setdefault(volume.id, asyncio.Lock())
        async with turn, self._slot(backend):
            need_s = _FIXED_S + await backend.allocated_bytes(volume) / _BYTES_PER_S
            with self._copying(target_id, need_s * _IDLE_FACTOR) as copying:
                return await copy(copying) or time.time_ns()

    async def _of_still(self, backend: Backend, volume: Volume, target_id: str, copy: Copy) -> int:
        """Copy a volume of a pool where it must not be written meanwhile; as `of_volume`."""
        moving_s = await backend.allocated_bytes(volume) / _BYTES_PER_S
        need_s = _FIXED_S + moving_s
        # Asked before the hold: a worker that is found after it may be one that has never heard of it.
        holder = await self._attachment(volume.id)
        if holder is None:
            before_ns = time.time_ns()
            with self._copying(target_id, need_s * _IDLE_FACTOR) as copying:
                await copy(copying)
            return before_ns
        self._refuse_spared(volume.id)
        if moving_s > backend.max_hold_s and not await backend.shares_blocks():
            raise FailedPrecondition(
                f"volume {volume.id} is attached, and its I/O would wait for about {moving_s:.0f} s while it is "
                f"copied; pool {backend.name!r} allows {backend.max_hold_s:.0f} s",
                hint=f"{_INSTEAD}; or allow it: max-hold-seconds of the pool",
            )
        hold_s, begun_s = min(need_s, backend.max_hold_s), time.monotonic()
        try:  # a hold whose answer did not reach us may have begun
            await self._agent.quiesce(volume.id, hold_s + _HOLD_MARGIN_S)
            cut_ns = time.time_ns()
            with self._copying(target_id, hold_s, since_s=begun_s) as copying:
                await self._within_hold(volume.id, hold_s, copy(copying))
        finally:
            await self._resume(volume.id)
        if not _held_through(holder, await self._attachment(volume.id)):
            raise Unavailable(
                f"the worker of volume {volume.id} did not live as long as the copy; the copy is discarded",
                hint="retry",
            )
        return cut_ns

    async def of_snapshot(self, backend: Backend, snapshot: Snapshot, target_id: str, copy: Copy) -> None:
        """Copy a snapshot, which nobody writes; arguments as `of_volume`."""
        async with self._slot(backend):
            need_s = _FIXED_S + await backend.allocated_bytes(snapshot) / _BYTES_PER_S
            with self._copying(target_id, need_s * _IDLE_FACTOR) as copying:
                await copy(copying)

    @contextmanager
    def _copying(self, target_id: str, within_s: float, since_s: float | None = None) -> Iterator[Copying]:
        """Have it known how far a copy is while the body makes it, within a time from now or from `since_s`."""
        copying = Copying((time.monotonic() if since_s is None else since_s) + within_s)
        self._under_way[target_id] = copying
        try:
            yield copying
        finally:
            del self._under_way[target_id]

    def _slot(self, backend: Backend) -> asyncio.Semaphore:
        slots = _SLOTS if backend.needs_hold else _REMOTE_SLOTS
        return self._slots.setdefault(backend.name, asyncio.Semaphore(slots))

    async def _within_hold(self, volume_id: str, hold_s: float, copying: Awaitable[int]) -> None:
        """Await a copy; one that does not fit its hold will not fit the next, so no caller is to try at once."""
        try:
            await copying
        except DeadlineExceeded as error:
            self._spared_until_s[volume_id] = time.monotonic() + hold_s * _SPARED_FACTOR
            raise FailedPrecondition(
                f"volume {volume_id} is attached, and its copy takes longer than it is held still, {hold_s:.0f} s",
                hint=_INSTEAD,
            ) from error

    def _refuse_spared(self, volume_id: str) -> None:
        spared_s = self._spared_until_s.get(volume_id, 0.0) - time.monotonic()
        if spared_s > 0:
            raise FailedPrecondition(
                f"volume {volume_id} is attached and was held still in vain for a copy that took too long; "
                f"it is not held again within {spared_s:.0f} s",
                hint=_INSTEAD,
            )
        self._spared_until_s.pop(volume_id, None)

    async def _attachment(self, volume_id: str) -> Attachment | None:
        return next((one for one in await self._agent.list() if one.volume_id == volume_id), None)

    async def _resume(self, volume_id: str) -> None:
        try:
            await self._agent.resume(volume_id)
        except VduseError as error:
            log.get().warning(
                "the volume goes on by itself when its hold ends", volume_id=volume_id, error=str(error)
            )


def _held_through(before: Attachment, after: Attachment | None) -> bool:
    """Tell whether the worker that was told to hold still is the one that serves now, so that nobody wrote."""
    if after is None or (after.state, after.worker_pid) != (before.state, before.worker_pid):
        return False
    # A broken device gets no other worker before it is detached.
    return before.worker_pid != 0 or before.state is State.BROKEN
