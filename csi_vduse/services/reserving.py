"""Promising room in a pool: look at what is left and record the promise, with nothing in between.

One lock for each pool; it is held for a measurement and one small write, never for a copy.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable

from csi_vduse.backends.accounting import available_bytes
from csi_vduse.backends.base import Backend
from csi_vduse.errors import ResourceExhausted
from csi_vduse.volumes.registry import Registry


class Reservations:
    """Guards the pools' room.

    Args:
        registry: holds the promises, as records of volumes and snapshots.
    """

    def __init__(self, registry: Registry) -> None:
        self._registry = registry
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def available(self, backend: Backend) -> int:
        """Return what may still be promised in a pool, in bytes."""
        return available_bytes(
            await backend.usage(),
            pool=backend.name,
            volumes=await self._registry.list_volumes(),
            snapshots=await self._registry.list_snapshots(),
        )

    async def reserve(
        self, backend: Backend, need_bytes: int, record: Callable[[], Awaitable[object]]
    ) -> None:
        """Write a record that promises `need_bytes` more than before, if there is room.

        Args:
            backend: the pool.
            need_bytes: what the record adds.
            record: writes it.

        Raises:
            ResourceExhausted: there is not enough left; nothing is written.
        """
        async with self._locks[backend.name]:
            left_bytes = await self.available(backend)
            if need_bytes > left_bytes:
                raise ResourceExhausted(
                    f"pool {backend.name!r} has {left_bytes} bytes left, {need_bytes} more are needed",
                    hint="delete volumes or snapshots, enlarge the pool's file system, or use another pool",
                )
            await record()
