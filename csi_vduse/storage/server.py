"""The storage server: what happens, in order, when an image is made, copied, grown, published or removed.

Kept true, at every point where this process or its daemon may die:
- An image has a record from the moment it is seen; the record is written before the act, and `_recover`
  makes a daemon serve exactly what the records say: no export without a publication, no publication
  without an export.
- A publication that was taken back is never served again: its export's name is used once.
- One operation at a time on each image; one that has begun is finished or undone (the caller's end does not
  stop it).
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from csi_vduse import log
from csi_vduse.errors import (
    AlreadyExists,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from csi_vduse.run import run
from csi_vduse.storage.block import Block, Seen
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.daemon import Daemon
from csi_vduse.storage.model import Format, Image, Key, Kind, Publication, objection
from csi_vduse.storage.qmp import Qmp, QmpRefused, is_refusal
from csi_vduse.storage.store import Store
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool

P = ParamSpec("P")
R = TypeVar("R")

_SECTOR_BYTES = 512
_THREADS = 4
_CHECK_TIMEOUT_S = 600.0
_MEND_INTERVAL_S = 5.0
_NO_SPACE = (28, 122)  # ENOSPC, EDQUOT


@dataclass(frozen=True)
class ImageStatus:
    """An image as it is now; problem is empty if nothing is wrong."""

    image: Image
    allocated_bytes: int
    problem: str


@dataclass(frozen=True)
class Published:
    """Where a node finds its export."""

    publication: Publication
    uri: str


class StorageServer:
    """See the module.

    Args:
        config: what it is told.
    """

    def __init__(self, config: ServerConfig) -> None:
        self._config = config
        self._store = Store(config.directory)
        self._threads = BlockingPool("storage", _THREADS)
        self._daemon = Daemon(config, self._recover)
        self._block: Block | None = None
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()
        self._unserved: set[Key] = set()

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
        self._config.run_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._store.locked():
            await self._disk(self._store.pool_id)
            try:
                await self._daemon.start()
                await self._disk(self._store.clean)
                mending = asyncio.create_task(self._mend())
                try:
                    yield
                finally:
                    mending.cancel()
            finally:
                await self._daemon.close()
                self._threads.close()

    async def pool_id(self) -> str:
        """Return the pool's id.

        Raises:
            Unavailable: the daemon is away.
        """
        self._require_block()
        return await self._disk(self._store.pool_id)

    async def usage(self) -> tuple[int, int, int]:
        """Return the pool's size, what others occupy, and what snapshots occupy, in bytes."""
        return await self._disk(self._store.usage)

    async def create(self, volume_id: str, size_bytes: int) -> None:
        """Make a volume that reads as zeros; fine if it is there."""
        key = Key(Kind.VOLUME, volume_id)
        _require_sectors(size_bytes)
        async with self._alone(key):
            if await self._disk(self._store.find, key) is not None:
                return
            image = Image(key, self._config.image_format, size_bytes)
            async with self._unfinished(image) as path:
                await self._make_file(path, image)

    async def copy(self, source: Key, target: Key, size_bytes: int, *, timeout_s: float) -> int:
        """Make an image with the source's content at one moment; return that moment, ns since 1970.

        The source may be in use: its clients do not notice. Fine if the target is there.

        Args:
            source: a volume or snapshot.
            target: becomes an independent image.
            size_bytes: of the target, at least the source's.
            timeout_s: after this the copy is given up and nothing is left.

        Raises:
            NotFound: there is no such source.
            OutOfRange: it is larger than size_bytes.
            DeadlineExceeded: timeout_s was not enough.
        """
        until_s = time.monotonic() + timeout_s
        _require_sectors(size_bytes)
        async with self._alone(source, target):
            if await self._disk(self._store.find, target) is not None:
                return time.time_ns()
            found = await self._require(source)
            block = self._require_block()
            async with AsyncExitStack() as undo:
                await self._opened(block, found, undo)
                source_bytes = await block.size_bytes(_node(found))
                if source_bytes > size_bytes:
                    raise OutOfRange(
                        f"{source.id} has {source_bytes} bytes, its copy was to have {size_bytes}"
                    )
                image = Image(target, self._config.image_format, size_bytes)
                path = await undo.enter_async_context(self._unfinished(image))
                await self._make_file(path, replace(image, size_bytes=source_bytes))
                node = f"t-{secrets.token_hex(8)}"
                await block.open(node, path, image.format)
                undo.push_async_callback(_close_quietly, block, node)
                await block.copy(_node(found), node, until_s=until_s)
                cut_ns = time.time_ns()
                if source_bytes != size_bytes:
                    await block.resize(node, size_bytes)
                await block.close(node)
            return cut_ns

    async def expand(self, volume_id: str, size_bytes: int) -> None:
        """Grow a volume; fine if it is that large. Its clients are cut off for a moment and come back.

        Raises:
            NotFound: there is none.
        """
        key = Key(Kind.VOLUME, volume_id)
        _require_sectors(size_bytes)
        async with self._alone(key):
            image = await self._require(key)
            block = self._require_block()
            async with AsyncExitStack() as undo:
                await self._opened(block, image, undo)
                if await block.size_bytes(_node(image)) < size_bytes:
                    serving = [one for one in image.publications if one.export in block.exports]
                    for one in serving:
                        await block.remove_export(one.export)
                    try:
                        await block.resize(_node(image), size_bytes)
                    finally:
                        for one in serving:
                            await block.add_export(one.export, _node(image), read_only=one.read_only)
            await self._disk(self._store.save, replace(image, size_bytes=max(image.size_bytes, size_bytes)))

    async def delete(self, key: Key) -> None:
        """Remove an image; fine if it is gone.

        Raises:
            FailedPrecondition: it is published.
        """
        async with self._alone(key):
            image = await self._disk(self._store.find, key)
            if image is not None and image.publications:
                nodes = ", ".join(one.node_id for one in image.publications)
                raise FailedPrecondition(f"{key.id} is published at {nodes}", hint="unpublish it first")
            if image is not None:
                await self._require_block().close(_node(image))
            await self._disk(self._store.delete, key)

    async def status(self, key: Key) -> ImageStatus | None:
        """Return an image as it is, or None if there is none."""
        image = await self._disk(self._store.find, key)
        if image is None:
            return None
        try:
            current = await self._disk(self._store.refreshed, image)
        except VduseError as error:
            return ImageStatus(image, 0, str(error))
        return ImageStatus(current, await self._disk(self._store.allocated_bytes, image), "")

    async def volumes(self) -> list[Image]:
        """Return what the records say of all volumes."""
        return await self._disk(self._store.list, Kind.VOLUME)

    async def publish(self, volume_id: str, node_id: str, *, read_only: bool, shared: bool) -> Published:
        """Give a node an epoch and an export of its own; the same again gives the same.

        Args:
            volume_id: what.
            node_id: to whom.
            read_only: the export refuses writes.
            shared: beside another node that may write (model.objection says when).

        Raises:
            NotFound: there is no such volume.
            AlreadyExists: the node has it otherwise.
            FailedPrecondition: another node has it, and that excludes this one.
        """
        key = Key(Kind.VOLUME, volume_id)
        async with self._alone(key):
            image = await self._require(key)
            block = self._require_block()
            found = image.of_node(node_id)
            if found is not None and found.closing:
                image, found = await self._close_publications(block, image, (found,)), None
            if found is not None:
                if (found.read_only, found.shared) != (read_only, shared):
                    raise AlreadyExists(
                        f"{volume_id} is published at {node_id} {_manner(found)}", hint="unpublish it first"
                    )
                await self._serve(block, image)
                return Published(found, self._config.uri(found.export))
            reason = objection(image, node_id=node_id, read_only=read_only, shared=shared)
            if reason:
                raise FailedPrecondition(f"{volume_id}: {reason}", hint="unpublish it there first")
            epoch = image.epoch + 1
            export = f"{volume_id}.{epoch}.{secrets.token_hex(8)}"
            new = Publication(node_id, epoch, export, read_only, shared)
            image = replace(image, epoch=epoch, publications=(*image.publications, new))
            await self._disk(self._store.save, image)
            try:
                await self._serve(block, image)
            except Unavailable:
                raise  # the next daemon serves what the record says, and the caller's retry finds it
            except VduseError:
                await self._close_publications(block, image, (new,))
                raise
            log.get().info(
                "published", volume_id=volume_id, node_id=node_id, epoch=epoch, read_only=read_only
            )
            return Published(new, self._config.uri(export))

    async def unpublish(self, volume_id: str, node_id: str = "") -> None:
        """Take a volume back from a node, or from all; nothing of theirs is in flight when this returns.

        Fine if it is not published there, or if there is no such volume.

        Raises:
            Unavailable: requests are still in flight; the node is cut off, and a retry goes on waiting.
        """
        key = Key(Kind.VOLUME, volume_id)
        async with self._alone(key):
            image = await self._disk(self._store.find, key)
            if image is None:
                return
            unwanted = tuple(one for one in image.publications if node_id in {"", one.node_id})
            if unwanted:
                image = await self._close_publications(self._require_block(), image, unwanted)
                log.get().info("unpublished", volume_id=volume_id, epochs=[one.epoch for one in unwanted])

    async def _close_publications(self, block: Block, image: Image, unwanted: Iterable[Publication]) -> Image:
        """Close exports for good: record that, close, record that it is done."""
        names = {one.export for one in unwanted}
        marked = tuple(
            replace(one, closing=True) if one.export in names else one for one in image.publications
        )
        image = replace(image, publications=marked)
        await self._disk(self._store.save, image)
        for name in sorted(names):
            await block.remove_export(name)
        image = replace(image, publications=tuple(one for one in marked if one.export not in names))
        if not image.publications:
            await block.close(_node(image))
        await self._disk(self._store.save, image)
        return image

    async def _serve(self, block: Block, image: Image) -> None:
        """Have an export for every open publication."""
        await block.open(_node(image), self._store.image_path(image), image.format)
        for one in image.publications:
            if not one.closing:
                await block.add_export(one.export, _node(image), read_only=one.read_only)

    async def _recover(self, qmp: Qmp, fresh: bool) -> None:  # noqa: FBT001 - the type Recover
        """Make a daemon serve what the records say, and nothing else."""
        self._block = None
        block = Block(qmp)
        seen = await block.observe()
        images = await self._disk(self._store.list, Kind.VOLUME)
        await self._remove_strays(block, seen, images)
        self._unserved = {image.key for image in images if image.publications}
        for key in sorted(self._unserved, key=lambda one: one.id):
            await self._serve_again(block, key, repair=fresh)
        if qmp.gone.is_set():
            raise Unavailable("qemu-storage-daemon died while it was given its exports")
        self._block = block

    async def _serve_again(self, block: Block, key: Key, *, repair: bool) -> None:
        """Serve a volume as its record says; one bad image must not keep the others away."""
        async with self._alone(key):
            try:
                image = await self._disk(self._store.find, key)
                if image is not None and repair:
                    await self._repair(image)
                closing = tuple(one for one in image.publications if one.closing) if image else ()
                if image is not None and closing:
                    image = await self._close_publications(block, image, closing)
                if image is not None and image.publications:
                    await self._serve(block, image)
            except VduseError as error:
                log.get().error("volume cannot be served yet", volume_id=key.id, error=str(error))
            else:
                self._unserved.discard(key)

    async def _mend(self) -> None:
        """Try again what could not be served when the daemon came up."""
        while True:
            await asyncio.sleep(_MEND_INTERVAL_S)
            if self._block is not None and not self._block.qmp.gone.is_set():
                for key in sorted(self._unserved, key=lambda one: one.id):
                    await self._serve_again(self._block, key, repair=False)

    async def _remove_strays(self, block: Block, seen: Seen, images: Iterable[Image]) -> None:
        """Remove what a daemon has that no record asks for: copies begun, exports taken back, nodes of both."""
        for job in sorted(seen.jobs):
            await block.end_job(job)
        published = {one.export for image in images for one in image.publications if not one.closing}
        for export in sorted(seen.exports - published):
            await block.remove_export(export)
        wanted = {_node(image) for image in images if image.publications}
        for node in sorted(seen.nodes - wanted):
            try:
                await block.close(node)
            except QmpRefused as error:  # a node between others; it goes with them
                log.get().warning("a node stays open", node=node, error=error.message)

    async def _repair(self, image: Image) -> None:
        """After a daemon died: give back the clusters that a qcow2 image had taken and not yet used."""
        if image.format is Format.QCOW2:
            path = str(self._store.image_path(image))
            await run(["qemu-img", "check", "-q", "-r", "leaks", path], timeout_s=_CHECK_TIMEOUT_S)

    async def _opened(self, block: Block, image: Image, undo: AsyncExitStack) -> None:
        """Open an image for one operation; what is published stays open after it."""
        read_only = image.key.kind is Kind.SNAPSHOT
        await block.open(_node(image), self._store.image_path(image), image.format, read_only=read_only)
        if not image.publications:
            undo.push_async_callback(_close_quietly, block, _node(image))

    @asynccontextmanager
    async def _unfinished(self, image: Image) -> AsyncIterator[Path]:
        """Give a path for the image's file; the image appears when the body ends well."""
        path = await self._disk(self._store.prepare, image)
        try:
            yield path
            await self._disk(self._store.finish, image, path)
        except BaseException:
            await self._disk(self._store.discard, path)
            raise

    async def _make_file(self, path: Path, image: Image) -> None:
        if image.format is Format.RAW:
            await self._disk(_make_sparse, path, image.size_bytes)
        else:
            await run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(image.size_bytes)])

    async def _require(self, key: Key) -> Image:
        image = await self._disk(self._store.find, key)
        if image is None:
            raise NotFound(f"there is no {key.kind.name.lower()} {key.id!r} on the storage server")
        return image

    def _require_block(self) -> Block:
        if self._block is None or self._block.qmp.gone.is_set():
            raise Unavailable("qemu-storage-daemon is being started", hint="retry")
        return self._block

    @asynccontextmanager
    async def _alone(self, *keys: Key) -> AsyncIterator[None]:
        """Have images for one operation; two that want the same pair take it in one order."""
        async with AsyncExitStack() as stack:
            for key in sorted(set(keys), key=lambda one: (one.kind.value, one.id)):
                lock = self._locks.setdefault(key, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield

    async def _disk(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return await self._threads.run(DEFAULT_TIMEOUT_S, function, *args, **kwargs)
        except OSError as error:
            if error.errno in _NO_SPACE:
                raise ResourceExhausted(
                    f"the storage server is full: {error}", hint="make room there"
                ) from error
            raise Unavailable(f"the storage server's disk: {error}", hint="look at its kernel log") from error


async def _close_quietly(block: Block, node: str) -> None:
    try:
        await block.close(node)
    except VduseError as error:
        if not is_refusal(error, "find node"):
            log.get().warning("a node stays open until the daemon restarts", node=node, error=str(error))


def _node(image: Image) -> str:
    """Return the name of an image's node; ids of volumes and snapshots differ."""
    return f"{'v' if image.key.kind is Kind.VOLUME else 's'}-{image.key.id}"


def _manner(publication: Publication) -> str:
    return ("read-only" if publication.read_only else "writable") + (", shared" if publication.shared else "")


def _make_sparse(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        path.chmod(0o600)
        file.truncate(size_bytes)


def _require_sectors(size_bytes: int) -> None:
    if size_bytes <= 0 or size_bytes % _SECTOR_BYTES:
        raise InvalidArgument(f"size {size_bytes} is not a positive multiple of {_SECTOR_BYTES}")
