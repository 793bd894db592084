"""One call at a time for each volume and snapshot, as a wrapper around the whole server.

A call that meets another one for the same object is answered ABORTED at once (CSI, "Concurrency"): it neither
waits nor runs beside it. Objects are locked by id, so a create and a delete of one volume meet too.

A copy can take hours, so it excludes no more than it must: what it reads is shared, and neither goes nor grows
meanwhile; that volume can be staged, published and modified. Only a copy during which nobody may attach or detach the
volume locks it too, and that is known where the copy is made (copies.py).

A call that has begun is carried to its end even if its caller goes away, with the lock held: half a format
or half an undo is worse than a late answer. The caller's retry is ABORTED meanwhile and then finds the work
done.
"""
# ruff: noqa: ANN401 - interceptors see messages of every type

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from csi_vduse import log
from csi_vduse.errors import Pending
from csi_vduse.services.rpc import method_name, rewrapped
from csi_vduse.volumes.ids import snapshot_id, volume_id


@dataclass(frozen=True)
class Keys:
    """What a call locks."""

    exclusive: frozenset[str] = frozenset()
    shared: frozenset[str] = frozenset()


class LockTable:
    """Who works on what, in this process. Never waits."""

    def __init__(self) -> None:
        self._exclusive: set[str] = set()
        self._shared: Counter[str] = Counter()

    def acquire(self, keys: Keys) -> None:
        """Take all or nothing.

        Raises:
            Pending: somebody works on one of them.
        """
        busy = (keys.exclusive | keys.shared) & self._exclusive
        busy |= {key for key in keys.exclusive if self._shared[key]}
        if busy:
            raise Pending(f"another call for {min(busy)} is running", hint="retry when it has ended")
        self._exclusive |= keys.exclusive
        self._shared.update(keys.shared)

    def release(self, keys: Keys) -> None:
        """Give back what `acquire` took."""
        self._exclusive -= keys.exclusive
        self._shared.subtract(keys.shared)
        self._shared += Counter()  # drops zeros

    @contextmanager
    def having(self, keys: Keys) -> Iterator[None]:
        """Have what `acquire` takes while the body runs."""
        self.acquire(keys)
        try:
            yield
        finally:
            self.release(keys)

    @property
    def held(self) -> Collection[str]:
        """What is locked now."""
        return self._exclusive | set(self._shared)


def keys_of(method: str, request: Any) -> Keys | None:
    """Return what a call must lock, or None for calls that only look.

    Args:
        method: name of the RPC.
        request: its message; not yet validated, so ids may be missing: a call without them fails by itself.
    """
    if method == "CreateVolume":
        source = request.volume_content_source
        return creation(
            volume_id(request.name) if request.name else "",
            of_volume=source.volume.volume_id,
            of_snapshot=source.snapshot.snapshot_id,
        )
    if method == "CreateSnapshot":
        return creation(snapshot_id(request.name) if request.name else "", of_volume=request.source_volume_id)
    if method == "DeleteSnapshot":
        return _keys({request.snapshot_id})
    if method in _ONE_VOLUME:
        return change(request.volume_id) if method in _IMAGE else _keys({request.volume_id})
    if method in _PUBLICATION:
        # Not the volume: a copy of it, which can take long, must not delay a fence.
        return _keys({f"publication of {request.volume_id}" if request.volume_id else ""})
    return None


def creation(new: str, *, of_volume: str = "", of_snapshot: str = "") -> Keys:
    """Return what making a volume or snapshot locks, with what it is filled from; empty ids stand for nothing."""
    return _keys({new, _image(new)}, {_image(of_volume), of_snapshot})


def change(volume_id: str) -> Keys:
    """Return what a volume's deletion and growth lock: copies read it as it is."""
    return _keys({volume_id, _image(volume_id)})


def _image(of: str) -> str:
    return f"image of {of}" if of else ""


_IMAGE = frozenset({"DeleteVolume", "ControllerExpandVolume"})
_ONE_VOLUME = _IMAGE | frozenset(
    {
        "ControllerModifyVolume",
        "NodeStageVolume",
        "NodeUnstageVolume",
        "NodePublishVolume",
        "NodeUnpublishVolume",
        "NodeExpandVolume",
    }
)


_PUBLICATION = frozenset({"ControllerPublishVolume", "ControllerUnpublishVolume"})


def _keys(exclusive: set[str], shared: Collection[str] = ()) -> Keys:
    return Keys(frozenset(exclusive - {""}), frozenset(set(shared) - {""}))


class LockInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every service; belongs inside of the interceptor that turns errors into statuses.

    Args:
        table: shared with what works on volumes beside the calls; None: nothing does.
    """

    def __init__(self, table: LockTable | None = None) -> None:
        self._table = table or LockTable()
        self._running: set[asyncio.Task[Any]] = set()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with the lock around it."""
        method = method_name(handler_call_details)

        async def locked(behaviour: Callable[[], Awaitable[Any]], request: Any) -> Any:
            keys = keys_of(method, request)
            if keys is None:
                return await behaviour()
            self._table.acquire(keys)
            task = asyncio.ensure_future(behaviour())
            self._running.add(task)
            task.add_done_callback(lambda _: self._release(task, keys))
            try:
                return await asyncio.shield(task)
            except asyncio.CancelledError:
                task.add_done_callback(lambda _: _log_end(task, method))
                raise

        return rewrapped(await continuation(handler_call_details), locked)

    async def drain(self, timeout_s: float) -> None:
        """Wait for calls whose callers have gone; those that take longer are given up.

        Args:
            timeout_s: how long.
        """
        if self._running:
            _, late = await asyncio.wait(self._running, timeout=timeout_s)
            for task in late:
                task.cancel()

    def _release(self, task: asyncio.Task[Any], keys: Keys) -> None:
        self._running.discard(task)
        self._table.release(keys)


def _log_end(task: asyncio.Task[Any], method: str) -> None:
    """Tell the log how a call ended whose caller had gone; nobody else hears of it."""
    error = None if task.cancelled() else task.exception()
    logger = log.get()
    if task.cancelled():
        logger.warning("call without a caller was given up", rpc=method)
    elif error is not None:
        logger.warning("call without a caller failed", rpc=method, error=str(error))
    else:
        logger.info("call without a caller ended", rpc=method)
