"""Who of several controllers leads: a Lease of coordination.k8s.io, as every Kubernetes component keeps one.

Keeps true: at most one process believes that it leads, as long as the clocks of the processes run at about
the same speed: a leader that could not renew for RENEW_DEADLINE_S stops believing it before another may take
the lease after LEASE_S. Times written by others are never compared with our clock: a lease is stale when it
did not change for LEASE_S of *our* time (as client-go does).
"""

from __future__ import annotations

import asyncio
import datetime as dt
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

from csi_vduse import log
from csi_vduse.errors import AlreadyExists, VduseError
from csi_vduse.kube.api import ApiServer, Conflict
from csi_vduse.kube.resources import Object, leases


@dataclass(frozen=True)
class Timing:
    """client-go's usual times, in seconds."""

    lease_s: float = 15.0
    renew_deadline_s: float = 10.0
    retry_s: float = 2.0


class Election:
    """Tries to hold a lease.

    Args:
        api: where it is.
        namespace: of the lease.
        name: of the lease.
        identity: of this process; a new one for each start.
        timing: see Timing.
    """

    def __init__(
        self, api: ApiServer, *, namespace: str, name: str, identity: str, timing: Timing | None = None
    ) -> None:
        self._api = api
        self._leases = leases(namespace)
        self._namespace = namespace
        self._name = name
        self._identity = identity
        self._timing = timing or Timing()
        self._seen: tuple[str, str] = ("", "")
        self._seen_at_s = 0.0
        self._renewed = False
        self.leading = False

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work` whenever we lead, and cancel it when we do not any more. Never returns."""
        while True:
            await self._acquire()
            log.get().info("leading", lease=self._name)
            self.leading = True
            task = asyncio.ensure_future(work())
            try:
                await self._keep(task)
            finally:
                self.leading = False
                task.cancel()
                with suppress(asyncio.CancelledError):
                    await task
            log.get().warning("not leading any more", lease=self._name)

    async def release(self) -> None:
        """Give the lease back if it is ours, so that another takes it at once; failing is harmless."""
        with suppress(VduseError):
            found = await self._api.get(self._leases, self._name)
            if found is not None and found["spec"].get("holderIdentity") == self._identity:
                found["spec"]["holderIdentity"] = ""
                await self._api.replace(self._leases, found)

    async def _acquire(self) -> None:
        while not await self._try():  # noqa: ASYNC110 - the server tells nobody that a lease is free
            await asyncio.sleep(self._timing.retry_s)

    async def _keep(self, task: asyncio.Future[None]) -> None:
        """Renew until that fails for too long, or the work has ended."""
        renewed_at_s = time.monotonic()
        while not task.done():
            await asyncio.wait({task}, timeout=self._timing.retry_s)
            left_s = renewed_at_s + self._timing.renew_deadline_s - time.monotonic()
            if left_s <= 0:
                return
            try:
                async with asyncio.timeout(left_s):
                    if not await self._try():
                        return
            except TimeoutError:
                return
            else:
                if self._renewed:
                    renewed_at_s = time.monotonic()
        error = None if task.cancelled() else task.exception()
        if error is not None:
            log.get().error("the leader's work failed; it begins again", error=repr(error))

    async def _try(self) -> bool:
        """Take or renew the lease; True unless another holds it. `_renewed` tells whether it was written."""
        self._renewed = False
        try:
            found = await self._api.get(self._leases, self._name)
            if found is None:
                await self._api.create(self._leases, self._lease({"leaseTransitions": 0}, None))
            elif not self._may_take(found):
                return False
            else:
                await self._api.replace(self._leases, self._lease(found["spec"], found))
        except (Conflict, AlreadyExists):
            return self.leading  # somebody was faster, or our own write was seen late: look again
        except VduseError as error:
            log.get().warning("the lease cannot be read or written", lease=self._name, error=str(error))
            return self.leading
        self._renewed = True
        return True

    def _may_take(self, found: Object) -> bool:
        holder = found["spec"].get("holderIdentity") or ""
        seen = (holder, found["spec"].get("renewTime") or "")
        if seen != self._seen:
            self._seen, self._seen_at_s = seen, time.monotonic()
        stale = time.monotonic() - self._seen_at_s > self._timing.lease_s
        return holder in {"", self._identity} or stale

    def _lease(self, spec: Object, found: Object | None) -> Object:
        now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        ours = spec.get("holderIdentity") == self._identity
        return {
            "apiVersion": "coordination.k8s.io/v1",
            "kind": "Lease",
            "metadata": found["metadata"] if found else {"name": self._name, "namespace": self._namespace},
            "spec": {
                **spec,
                "holderIdentity": self._identity,
                "leaseDurationSeconds": max(1, int(self._timing.lease_s)),
                "renewTime": now,
                "acquireTime": spec.get("acquireTime", now) if ours else now,
                "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (0 if ours else 1),
            },
        }
