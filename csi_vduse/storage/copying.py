"""Copies that the storage server makes: each is a job of its own, known by the image that it makes.

Kept true:
- Nobody's end ends a job, neither a controller's nor a connection's: only its deadline, an error, or the deletion of
  what it makes. Who asks again joins it, or is told of the image that it has made.
- A source can be published and taken back while it is copied: a job has it for itself at its begin and its end alone.
- One copy of a volume at a time, since the daemon mirrors a node once; of a snapshot, which nobody writes, any number.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from typing import Any, TypeVar
from weakref import WeakValueDictionary

from csi_vduse import log
from csi_vduse.errors import AlreadyExists, OutOfRange, Pending, VduseError
from csi_vduse.storage.block import Block
from csi_vduse.storage.core import Core, close_quietly, node_of
from csi_vduse.storage.making import make_file, prepared
from csi_vduse.storage.model import Image, Key, Kind

T = TypeVar("T")


class _Job:
    """One copy under way; `task` ends with the moment of its content."""

    def __init__(self, source: Key, size_bytes: int) -> None:
        self.source = source
        self.size_bytes = size_bytes
        self.node = ""  # of its target; also the name of the daemon's job
        self.task: asyncio.Task[int]
        self._part: asyncio.Task[Any] | None = None
        self._unwanted = False

    async def long(self, part: Coroutine[Any, Any, T]) -> T:
        """Await a part that may take hours.

        Raises:
            Pending: the job was ended.
        """
        running: asyncio.Task[T] = asyncio.create_task(part)
        self._part = running
        if self._unwanted:
            running.cancel()
        try:
            return await running
        except asyncio.CancelledError:
            if not self._unwanted:
                raise
            raise Pending("the copy was ended, since what it makes is deleted", hint="retry") from None

    def end(self) -> None:
        """End the part that takes long, or the next such; all else is left to come to its own end."""
        self._unwanted = True
        if self._part is not None:
            self._part.cancel()


class CopyJobs:
    """See the module.

    Args:
        core: what the parts of the server share.
    """

    def __init__(self, core: Core) -> None:
        self._core = core
        self._jobs: dict[Key, _Job] = {}
        self._turns: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def copy(self, source: Key, target: Key, size_bytes: int, *, timeout_s: float) -> int:
        """See StorageServer.copy; starts a job, or joins the one that is under way."""
        job = self._jobs.get(target)
        if job is None:
            job = self._jobs[target] = _Job(source, size_bytes)
            job.task = asyncio.create_task(self._make(job, target, timeout_s))
            job.task.add_done_callback(lambda _: self._ended(target))
        elif (job.source, job.size_bytes) != (source, size_bytes):
            raise Pending(f"{target.id} is being made from {job.source.id}", hint="delete it, or retry then")
        return await asyncio.shield(job.task)

    async def end(self, target: Key) -> None:
        """End the job that makes an image, if there is one; nothing of it is left, or the whole image."""
        job = self._jobs.get(target)
        if job is not None:
            job.end()
            await asyncio.wait({job.task})

    async def progress(self, target: Key) -> tuple[int, int]:
        """See StorageServer.progress."""
        job, block = self._jobs.get(target), self._core.block
        return (0, 0) if job is None or block is None or not job.node else await block.progress(job.node)

    async def close(self) -> None:
        """End all jobs."""
        for target in list(self._jobs):
            await self.end(target)

    def _ended(self, target: Key) -> None:
        task = self._jobs.pop(target).task
        error = (
            None if task.cancelled() else task.exception()
        )  # also marks it as seen: nobody may wait any more
        if error is not None:
            log.get().warning("a copy was not made", id=target.id, error=str(error))

    async def _make(self, job: _Job, target: Key, timeout_s: float) -> int:
        async with self._core.alone(target):
            found = await self._core.disk(self._core.store.find, target)
            if found is not None:
                return _made(found, job)
            block = self._core.require_block()
            async with AsyncExitStack() as undo:
                node = await undo.enter_async_context(self._being_copied(block, job.source))
                if job.source.kind is Kind.VOLUME:
                    turn = self._turns.setdefault(job.source, asyncio.Lock())
                    await job.long(turn.acquire())
                    undo.callback(turn.release)
                return await self._copy(job, block, node, target, time.monotonic() + timeout_s)

    async def _copy(self, job: _Job, block: Block, source: str, target: Key, until_s: float) -> int:
        source_bytes = await block.size_bytes(source)
        if source_bytes > job.size_bytes:
            raise OutOfRange(
                f"{job.source.id} has {source_bytes} bytes, its copy was to have {job.size_bytes}"
            )
        image = Image(target, self._core.config.image_format, job.size_bytes, source=job.source)
        async with prepared(self._core, image) as path, AsyncExitStack() as undo:
            await make_file(self._core, path, replace(image, size_bytes=source_bytes))
            node = f"t-{secrets.token_hex(8)}"
            await block.open(node, path, image.format)
            undo.push_async_callback(close_quietly, block, node)
            job.node = node
            await job.long(block.copy(source, node, until_s=until_s))
            cut_ns = time.time_ns()
            if source_bytes != job.size_bytes:
                await block.resize(node, job.size_bytes)
            await block.close(node)
            await self._core.disk(self._core.store.finish, replace(image, cut_at_ns=cut_ns), path)
        return cut_ns

    @asynccontextmanager
    async def _being_copied(self, block: Block, key: Key) -> AsyncIterator[str]:
        """Keep a source open while the body copies it, whoever is given it or loses it meanwhile; gives its node."""
        async with self._core.alone(key):
            image = await self._core.require(key)
            read_only = key.kind is Kind.SNAPSHOT
            node = f"c-{secrets.token_hex(8)}" if read_only else node_of(image)
            await block.open(node, self._core.store.image_path(image), image.format, read_only=read_only)
            self._core.copied[key] += 1
        try:
            yield node
        finally:
            async with self._core.alone(key):
                self._core.copied[key] -= 1
                if not self._core.copied[key]:
                    del self._core.copied[key]
                if read_only or not await self._is_used(key):
                    await close_quietly(block, node)

    async def _is_used(self, volume: Key) -> bool:
        try:
            image = await self._core.disk(self._core.store.find, volume)
        except VduseError:
            return True  # who can say
        return self._core.copied[volume] > 0 or (image is not None and bool(image.publications))


def _made(found: Image, job: _Job) -> int:
    """Return the moment of an image that is there, if it is the copy that is asked for."""
    if (found.source, found.size_bytes) != (job.source, job.size_bytes):
        raise AlreadyExists(
            f"{found.key.id} is there, and is no copy of {job.source.id} with {job.size_bytes} bytes",
            hint="delete it first",
        )
    return found.cut_at_ns
