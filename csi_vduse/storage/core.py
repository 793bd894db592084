"""What the parts of the storage server share: directory, connection to the daemon, and a lock for each image."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from typing import ParamSpec, TypeVar
from weakref import WeakValueDictionary

from csi_vduse import log
from csi_vduse.errors import NotFound, ResourceExhausted, Unavailable, VduseError
from csi_vduse.files import NO_SPACE
from csi_vduse.storage.block import Block
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.model import Image, Key, Kind
from csi_vduse.storage.qmp import is_refusal
from csi_vduse.storage.store import Store
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool

P = ParamSpec("P")
R = TypeVar("R")

_THREADS = 4


class Core:
    """See the module.

    Args:
        config: what the server is told.
    """

    def __init__(self, config: ServerConfig) -> None:
        self.config = config
        self.store = Store(config.directory)
        self.threads = BlockingPool("storage", _THREADS)
        self.block: Block | None = None
        # Images that copies are being made of, and how many.
        self.copied: Counter[Key] = Counter()
        self._locks: WeakValueDictionary[Key, asyncio.Lock] = WeakValueDictionary()

    async def require(self, key: Key) -> Image:
        """Return an image that there is.

        Raises:
            NotFound: there is none.
        """
        image = await self.disk(self.store.find, key)
        if image is None:
            raise NotFound(f"there is no {key.kind.name.lower()} {key.id!r} on the storage server")
        return image

    def require_block(self) -> Block:
        """Return the block layer of the running daemon.

        Raises:
            Unavailable: it is being started.
        """
        if self.block is None or self.block.qmp.gone.is_set():
            raise Unavailable("qemu-storage-daemon is being started", hint="retry")
        return self.block

    @asynccontextmanager
    async def alone(self, *keys: Key) -> AsyncIterator[None]:
        """Have images for one operation; two that want the same pair take it in one order."""
        async with AsyncExitStack() as stack:
            for key in sorted(set(keys), key=lambda one: (one.kind.value, one.id)):
                lock = self._locks.setdefault(key, asyncio.Lock())
                await stack.enter_async_context(lock)
            yield

    async def disk(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Run a function of the store in a thread, with OSError told in our words."""
        try:
            return await self.threads.run(DEFAULT_TIMEOUT_S, function, *args, **kwargs)
        except OSError as error:
            if error.errno in NO_SPACE:
                raise ResourceExhausted(
                    f"the storage server is full: {error}", hint="make room there"
                ) from error
            raise Unavailable(f"the storage server's disk: {error}", hint="look at its kernel log") from error


async def close_quietly(block: Block, node: str) -> None:
    """Close a node at the end of an operation, which has its own outcome."""
    try:
        await block.close(node)
    except VduseError as error:
        if not is_refusal(error, "find node"):
            log.get().warning("a node stays open until the daemon restarts", node=node, error=str(error))


def node_of(image: Image) -> str:
    """Return the name of an image's node; ids of volumes and snapshots differ."""
    return f"{'v' if image.key.kind is Kind.VOLUME else 's'}-{image.key.id}"
