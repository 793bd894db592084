"""The storage server: what happens, in order, when an image is made, copied, grown or removed.

Kept true:
- An image has a record from the moment it is seen (store.py); who has it is in publications.py.
- One operation at a time on each image; one that has begun is finished or undone (the caller's end does not
  stop it, service.py). Only a copy, which can take long, is a job of its own, and delays no fence (copying.py).
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace

from csi_vduse.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Pending, VduseError
from csi_vduse.storage.block import Block
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.copying import CopyJobs
from csi_vduse.storage.core import Core, close_quietly, node_of
from csi_vduse.storage.daemon import Daemon
from csi_vduse.storage.making import make_file, prepared
from csi_vduse.storage.model import Image, Key, Kind
from csi_vduse.storage.publications import Publications, Published

_SECTOR_BYTES = 512


@dataclass(frozen=True)
class ImageStatus:
    """An image as it is now; problem is empty if nothing is wrong."""

    image: Image
    allocated_bytes: int
    problem: str


class StorageServer:
    """See the module.

    Args:
        config: what it is told.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._core = Core(config)
        self._publications = Publications(self._core)
        self._copies = CopyJobs(self._core)
        self._daemon = Daemon(config, self._publications.recover)

    @property
    def daemon_pid(self) -> int:
        """Process id of the daemon; 0 while there is none."""
        return self._daemon.pid

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Have the directory and a daemon that serves it while the body runs.

        Raises:
            FailedPrecondition: the directory is missing or taken, or the daemon does not start.
        """
        self._core.config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._core.store.locked():
            await self._core.disk(self._core.store.pool_id)
            try:
                await self._daemon.start()
                await self._core.disk(self._core.store.clean)
                mending = asyncio.create_task(self._publications.mend())
                try:
                    yield
                finally:
                    mending.cancel()
                    await self._copies.close()
            finally:
                await self._daemon.close()
                self._core.threads.close()

    async def pool_id(self) -> str:
        """Return the pool's id.

        Raises:
            Unavailable: the daemon is away.
        """
        self._core.require_block()
        return await self._core.disk(self._core.store.pool_id)

    async def usage(self) -> tuple[int, int, int]:
        """Return the pool's size, what others occupy, and what snapshots occupy, in bytes."""
        return await self._core.disk(self._core.store.usage)

    async def create(self, volume_id: str, size_bytes: int) -> None:
        """Make a volume that reads as zeros; fine if it is there.

        Raises:
            AlreadyExists: what is there is a copy of something.
        """
        key = Key(Kind.VOLUME, volume_id)
        _require_sectors(size_bytes)
        async with self._core.alone(key):
            found = await self._core.disk(self._core.store.find, key)
            if found is not None and found.source is not None:
                raise AlreadyExists(
                    f"{volume_id} is there, and is a copy of {found.source.id}", hint="delete it first"
                )
            if found is not None:
                return
            image = Image(key, self._core.config.image_format, size_bytes)
            async with prepared(self._core, image) as path:
                await make_file(self._core, path, image)
                await self._core.disk(self._core.store.finish, image, path)

    async def copy(self, source: Key, target: Key, size_bytes: int, *, timeout_s: float) -> int:
        """Make an image with the source's content at one moment; return that moment, ns since 1970.

        The source may be in use: its clients do not notice. Asked again the same way, it joins the copy that is under
        way, or returns the moment of the one that was made: whoever asked first may be gone.

        Args:
            source: a volume or snapshot.
            target: becomes an independent image.
            size_bytes: of the target, at least the source's.
            timeout_s: after this a copy that this call has started, and that does not get on any more, is given up and
                nothing is left.

        Raises:
            NotFound: there is no such source.
            OutOfRange: it is larger than size_bytes.
            AlreadyExists: the target is there and is something else.
            Pending: the target is being made from something else, or was deleted meanwhile.
            DeadlineExceeded: timeout_s was not enough, and it stands still.
        """
        _require_sectors(size_bytes)
        return await self._copies.copy(source, target, size_bytes, timeout_s=timeout_s)

    async def expand(self, volume_id: str, size_bytes: int) -> None:
        """Grow a volume; fine if it is that large. Its clients are cut off for a moment and come back.

        Raises:
            NotFound: there is none.
        """
        key = Key(Kind.VOLUME, volume_id)
        _require_sectors(size_bytes)
        async with self._core.alone(key):
            self._refuse_copied(key)
            image = await self._core.require(key)
            block = self._core.require_block()
            async with AsyncExitStack() as undo:
                await self._opened(block, image, undo)
                if await block.size_bytes(node_of(image)) < size_bytes:
                    try:
                        for name in (name for one in image.publications for name in one.exports):
                            await block.remove_export(name)
                        await block.resize(node_of(image), size_bytes)
                    finally:
                        image = await self._publications.resume(block, image)
            await self._core.disk(
                self._core.store.save, replace(image, size_bytes=max(image.size_bytes, size_bytes))
            )

    async def delete(self, key: Key) -> None:
        """Remove an image, and end the copy that makes it, if it is one; fine if it is gone.

        Raises:
            FailedPrecondition: it is published.
        """
        await self._copies.end(key)
        async with self._core.alone(key):
            self._refuse_copied(key)
            image = await self._core.disk(self._core.store.find, key)
            if image is not None and image.publications:
                nodes = ", ".join(one.node_id for one in image.publications)
                raise FailedPrecondition(f"{key.id} is published at {nodes}", hint="unpublish it first")
            if image is not None:
                await self._core.require_block().close(node_of(image))
            await self._core.disk(self._core.store.delete, key)

    async def status(self, key: Key) -> ImageStatus | None:
        """Return an image as it is, or None if there is none."""
        image = await self._core.disk(self._core.store.find, key)
        if image is None:
            return None
        try:
            current = await self._core.disk(self._core.store.refreshed, image)
        except VduseError as error:
            return ImageStatus(image, 0, str(error))
        return ImageStatus(current, await self._core.disk(self._core.store.allocated_bytes, image), "")

    async def progress(self, target: Key) -> tuple[int, int]:
        """Return how many bytes of how many a copy that is being made has, about; zeros if there is none."""
        return await self._copies.progress(target)

    async def volumes(self) -> list[Image]:
        """Return what the records say of all volumes."""
        return await self._core.disk(self._core.store.list, Kind.VOLUME)

    async def publish(self, volume_id: str, node_id: str, *, read_only: bool, shared: bool) -> Published:
        """See Publications.publish."""
        return await self._publications.publish(volume_id, node_id, read_only=read_only, shared=shared)

    async def renew(self, export: str, instead_of: str) -> Published:
        """See Publications.renew."""
        return await self._publications.renew(export, instead_of)

    async def unpublish(self, volume_id: str, node_id: str = "") -> None:
        """See Publications.unpublish."""
        await self._publications.unpublish(volume_id, node_id)

    async def _opened(self, block: Block, image: Image, undo: AsyncExitStack) -> None:
        """Open an image for one operation; what is published stays open after it."""
        read_only = image.key.kind is Kind.SNAPSHOT
        await block.open(
            node_of(image), self._core.store.image_path(image), image.format, read_only=read_only
        )
        if not image.publications:
            undo.push_async_callback(close_quietly, block, node_of(image))

    def _refuse_copied(self, key: Key) -> None:
        if self._core.copied[key]:
            raise Pending(f"{key.id} is being copied", hint="retry when the copy is done")


def _require_sectors(size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % _SECTOR_BYTES:
        raise InvalidArgument(f"size {size_bytes} is not a positive multiple of {_SECTOR_BYTES}")
