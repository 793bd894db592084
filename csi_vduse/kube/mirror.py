"""A copy of all objects of one kind, kept current by list and watch, with a way to wait for a change.

Keeps true: what it holds was true at some time, in order; after the API server was away it lists again, so
nothing is missed, only late. It never ends by itself and never raises: an API that is away for hours costs
one short request every few seconds.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager, suppress

from csi_vduse import log
from csi_vduse.errors import DeadlineExceeded, VduseError
from csi_vduse.kube.api import ApiServer, Event, Expired
from csi_vduse.kube.resources import Object, Resource, name_of, version_of

_FIRST_DELAY_S = 0.5
_MAX_DELAY_S = 15.0


class Mirror:
    """See the module; entered with `mirroring`.

    Args:
        api: where the objects are.
        resource: which kind.
        field_selector: which of them.
    """

    def __init__(self, api: ApiServer, resource: Resource, field_selector: str = "") -> None:
        self._api = api
        self._resource = resource
        self._selector = field_selector
        self._objects: dict[str, Object] = {}
        self._changed = asyncio.Condition()
        self._synced = asyncio.Event()
        self._seen_at_s = 0.0
        self._listeners: list[Callable[[str], None]] = []

    def listen(self, listener: Callable[[str], None]) -> None:
        """Call `listener(name)` for every object that changes or goes, and for all after each list."""
        self._listeners.append(listener)

    @property
    def synced(self) -> bool:
        """Whether the first list has come."""
        return self._synced.is_set()

    def age_s(self) -> float:
        """Return for how long nothing was heard from the API server, in seconds."""
        return time.monotonic() - self._seen_at_s

    def get(self, name: str) -> Object | None:
        """Return the object as last seen, or None."""
        return self._objects.get(name)

    def all(self) -> list[Object]:
        """Return all objects as last seen."""
        return list(self._objects.values())

    async def wait_synced(self) -> None:
        """Wait for the first list."""
        await self._synced.wait()

    async def wait_for(
        self, name: str, done: Callable[[Object | None], bool], *, timeout_s: float, what: str
    ) -> Object | None:
        """Wait until `done` holds for an object, and return it.

        Args:
            name: which; `done` gets None while there is none.
            done: of the object as it is.
            timeout_s: for how long.
            what: is waited for, for the error.

        Raises:
            DeadlineExceeded: it did not come about in time.
        """
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.synced and done(self._objects.get(name)))
        except TimeoutError:
            raise DeadlineExceeded(
                f"{what} did not come about within {timeout_s:g} s",
                hint="look at the driver's pods on the node, and at `kubectl vduse doctor`",
            ) from None
        return self._objects.get(name)

    async def run(self) -> None:
        """Follow the API for ever."""
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                version = await self._list()
                delay_s = _FIRST_DELAY_S
                while True:
                    version = await self._watch(version)
            except Expired:
                continue
            except VduseError as error:
                log.get().warning("the Kubernetes API is away", kind=self._resource.kind, error=str(error))
                # Not all nodes at the same moment when it comes back.
                await asyncio.sleep(delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - no secret
                delay_s = min(delay_s * 2, _MAX_DELAY_S)

    async def _list(self) -> str:
        found, version = await self._api.list(self._resource, self._selector)
        before = self._objects.keys()
        objects = {name_of(each): each for each in found}
        names = before | objects.keys()
        self._objects = objects
        await self._tell(names)
        return version

    async def _watch(self, version: str) -> str:
        """Follow one watch to its end; returns the version to go on from."""
        async for event in self._api.watch(self._resource, version, self._selector):
            version = version_of(event.object) or version
            await self._take(event)
        return version

    async def _take(self, event: Event) -> None:
        if event.type == "BOOKMARK":
            self._seen_at_s = time.monotonic()
            return
        name = name_of(event.object)
        if event.type == "DELETED":
            self._objects.pop(name, None)
        else:
            self._objects[name] = event.object
        await self._tell({name})

    async def _tell(self, names: Iterable[str]) -> None:
        self._seen_at_s = time.monotonic()
        self._synced.set()
        async with self._changed:
            self._changed.notify_all()
        for listener in self._listeners:
            for name in names:
                listener(name)


@asynccontextmanager
async def mirroring(*mirrors: Mirror) -> AsyncIterator[None]:
    """Keep the mirrors current while the body runs."""
    tasks = [asyncio.create_task(mirror.run()) for mirror in mirrors]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        for task in tasks:
            with suppress(asyncio.CancelledError):
                await task
