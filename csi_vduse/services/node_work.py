"""What a node does for the objects of its pools: creates, grows, snapshots and deletes where the bytes are.

The acts are those of `standalone` (provisioning.py, snapshotting.py), on a registry that writes statuses.
Keeps true: one act at a time for each object, and none while a CSI call for it runs (one table of locks);
every object is looked at again after a change, after an error, and every RESYNC_S; after an error not before
its time, unless something else is wanted: what an attempt writes changes the object too. What cannot be done is
said in the object's status. Nothing here ends the process: an API that is away is waited for.
A copy may take hours: it is not counted among the acts that run at once, and ends when its object is deleted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import structlog

from csi_vduse import log
from csi_vduse.errors import DeadlineExceeded, NotFound, Pending, Unavailable, VduseError
from csi_vduse.kube.api import ApiServer, Conflict
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import SNAPSHOTS, VOLUMES, Object, Resource, is_going, name_of
from csi_vduse.services.agent_port import Attachments
from csi_vduse.services.copies import Copies
from csi_vduse.services.locks import Keys, LockTable, change, creation
from csi_vduse.services.node_steps import Step, is_copy, snapshot_step, volume_step
from csi_vduse.services.provisioning import Provisioner
from csi_vduse.services.snapshotting import Snapshotter
from csi_vduse.services.validation import CreateSnapshot, CreateVolume, ExpandVolume
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.model import SourceKind
from csi_vduse.volumes.parameters import AskedParameters
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry
from csi_vduse.volumes.sizes import CapacityRange

RESYNC_S = 60.0
# Acts at once; copies are bounded elsewhere (copies.py), and hold up nothing here.
_SLOTS = 4
_PROGRESS_PERIOD_S = 10.0
_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 30.0
# Errors that another try can mend without anybody changing anything.
_TRANSIENT = (Unavailable, Pending, DeadlineExceeded, Conflict)

Key = tuple[Resource, str]


class NodeWork:
    """See the module.

    Args:
        node: our name.
        api: where the objects are.
        registry: this node's, over the same API.
        volumes: a mirror of this node's volumes.
        snapshots: a mirror of this node's snapshots.
        provisioner: acts on volumes.
        snapshotter: acts on snapshots.
        agent: knows what is attached.
        copies: tells how far they are.
        locks: shared with the CSI calls.
    """

    def __init__(
        self,
        *,
        node: str,
        api: ApiServer,
        registry: KubernetesRegistry,
        volumes: Mirror,
        snapshots: Mirror,
        provisioner: Provisioner,
        snapshotter: Snapshotter,
        agent: Attachments,
        copies: Copies,
        locks: LockTable,
    ) -> None:
        self._node = node
        self._api = api
        self._registry = registry
        self._mirrors = {VOLUMES: volumes, SNAPSHOTS: snapshots}
        self._provisioner = provisioner
        self._snapshotter = snapshotter
        self._agent = agent
        self._copies = copies
        self._locks = locks
        self._queue: asyncio.Queue[Key] = asyncio.Queue()
        self._queued: set[Key] = set()
        self._slots = asyncio.Semaphore(_SLOTS)
        self._running: set[Key] = set()
        self._copying: dict[Key, asyncio.Task[None]] = {}
        self._again: set[Key] = set()
        self._delays_s: dict[Key, float] = {}
        self._retries: dict[Key, asyncio.TimerHandle] = {}
        self._tried: dict[Key, object] = {}
        for resource, mirror in self._mirrors.items():
            mirror.listen(self._listener(resource))

    async def run(self) -> None:
        """Work until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._resync())
            while True:
                key = await self._queue.get()
                self._queued.discard(key)
                if key in self._running:  # it changed while we work on it: look again afterwards
                    self._again.add(key)
                    self._end_unwanted_copy(key)
                elif self._is_due(key):
                    self._running.add(key)
                    group.create_task(self._turn(key))

    async def _resync(self) -> None:
        while True:
            await asyncio.sleep(RESYNC_S)
            for resource, mirror in self._mirrors.items():
                for found in mirror.all():
                    self._enqueue((resource, name_of(found)))

    async def _turn(self, key: Key) -> None:
        """Work on one object, as far as it can be done now."""
        resource, name = key
        with structlog.contextvars.bound_contextvars(kind=resource.kind, object=name):
            try:
                await self._look_and_act(key)
                self._delays_s.pop(key, None)
                self._tried.pop(key, None)
            except _TRANSIENT as error:
                self._retry(key, error)
            except VduseError as error:
                # Not even the status could be written; the next resync comes anyway.
                log.get().error("an object could not be worked on", error=str(error))
                self._retry(key, error)
            except Exception:  # noqa: BLE001 - one object must not stop the work on the others
                log.get().exception("unexpected error")
                self._retry(key, None)
            finally:
                self._running.discard(key)
        if key in self._again:
            self._again.discard(key)
            self._enqueue(key)

    async def _look_and_act(self, key: Key) -> None:
        resource, name = key
        async with self._slots:
            found = await self._api.get(resource, name)
            self._tried[key] = _circumstances(found)
            decide = volume_step if resource is VOLUMES else snapshot_step
            step = decide(found, self._node)
            if found is None or step is Step.NOTHING:
                return
            if not is_copy(resource, found, step):
                await self._take(resource, found, step)
                return
        self._copying[key] = asyncio.create_task(self._take(resource, found, step))
        self._end_unwanted_copy(key)  # the mirror may have heard of a deletion before we looked
        try:
            await self._watch(key, self._copying[key])
        finally:
            del self._copying[key]

    async def _watch(self, key: Key, copying: asyncio.Task[None]) -> None:
        """Await a copy and tell how far it is; one that was ended because nobody wants it is no error."""
        try:
            while not (await asyncio.wait({copying}, timeout=_PROGRESS_PERIOD_S))[0]:
                await self._tell_progress(key)
        except BaseException:  # such as the end of us all: nothing goes on that nobody watches
            copying.cancel()
            await asyncio.wait({copying})
            raise
        with suppress(asyncio.CancelledError):
            await copying

    async def _tell_progress(self, key: Key) -> None:
        resource, name = key
        copied_bytes, total_bytes = self._copies.progress(name)
        if not total_bytes:
            return
        try:
            await self._registry.update_status(
                resource,
                name,
                lambda now: objects.with_progress(now, copied_bytes, total_bytes),
            )
        except VduseError as error:
            log.get().warning("how far a copy is could not be told", error=str(error))

    def _end_unwanted_copy(self, key: Key) -> None:
        resource, name = key
        found = self._mirrors[resource].get(name)
        if key in self._copying and (found is None or is_going(found)):
            log.get().info("nobody wants this copy any more", kind=resource.kind, object=name)
            self._copying[key].cancel()

    async def _take(self, resource: Resource, found: Object, step: Step) -> None:
        """Take one step and record how it ended."""
        with self._locks.having(lock_keys(resource, found, step)):
            try:
                await self._act(resource, found, step)
            except VduseError as error:
                await self._report(resource, found, step, error)
                if isinstance(error, _TRANSIENT) or step is Step.DELETE:
                    raise
                return
        # Not under the lock: a volume that is ready is wanted at once, and its stage must not meet us.
        await self._mark(resource, found, step)
        self._enqueue((resource, name_of(found)))  # there may be another step

    async def _act(self, resource: Resource, found: Object, step: Step) -> None:
        name = name_of(found)
        log.get().info("working", step=step.name)
        if step is Step.DELETE:
            await (self._provisioner if resource is VOLUMES else self._snapshotter).delete(name)
        elif resource is SNAPSHOTS:
            spec = found["spec"]
            await self._snapshotter.create(CreateSnapshot(spec["snapshotName"], spec["sourceVolumeId"], None))
        elif step is Step.CREATE:
            await self._provisioner.create(create_request(found))
        elif step is Step.EXPAND:
            wanted = CapacityRange(required_bytes=int(found["spec"]["capacityBytes"]))
            await self._provisioner.expand(ExpandVolume(name, wanted, None))
        elif step is Step.OBSERVE:
            with suppress(NotFound):  # not attached: the next attach has them
                await self._agent.throttle(name, objects.throttle_of(found))

    async def _mark(self, resource: Resource, found: Object, step: Step) -> None:
        """Record that the spec, as it was when we looked, is met."""
        known: Object = {"observedGeneration": found["metadata"]["generation"]}
        if step is Step.DELETE:
            known["state"] = objects.DELETED
        elif step is Step.FORGET_EXPANSION:
            known["expandingToBytes"] = 0

        def met(now: Object) -> Object:
            kept = {key: value for key, value in now.get("status", {}).items() if key != "error"}
            return {**kept, **known}

        with suppress(NotFound):
            await self._registry.update_status(resource, name_of(found), met)

    async def _report(self, resource: Resource, found: Object, step: Step, error: VduseError) -> None:
        """Say in the status what went wrong; a creation that can never succeed has failed."""
        log.get().warning("a step failed", step=step.name, error=str(error))
        # A delete is tried for as long as the object is there: what keeps it (an attachment) goes some day.
        retrying = isinstance(error, _TRANSIENT) or step is Step.DELETE
        said = objects.error_status(error, found["metadata"]["generation"], retrying=retrying)

        def status(now: Object) -> Object:
            failed = {"state": objects.FAILED} if step is Step.CREATE and not retrying else {}
            return {**objects.without_progress(now.get("status", {})), **failed, "error": said}

        with suppress(NotFound):
            await self._registry.update_status(resource, name_of(found), status)

    def _retry(self, key: Key, error: VduseError | None) -> None:
        delay_s = self._delays_s.get(key, _FIRST_DELAY_S)
        self._delays_s[key] = min(delay_s * 2, _MAX_DELAY_S)
        log.get().info("trying again later", delay_s=delay_s, error=str(error) if error else None)
        self._retries[key] = asyncio.get_running_loop().call_later(delay_s, self._enqueue_retry, key)

    def _is_due(self, key: Key) -> bool:
        """Tell whether to look now: always, but for an object that was tried in vain and is as it was then."""
        resource, name = key
        if key in self._retries and _circumstances(self._mirrors[resource].get(name)) == self._tried.get(key):
            return False
        retry = self._retries.pop(key, None)
        if retry is not None:
            retry.cancel()
        return True

    def _enqueue_retry(self, key: Key) -> None:
        del self._retries[key]
        self._enqueue(key)

    def _listener(self, resource: Resource) -> Callable[[str], None]:
        return lambda name: self._enqueue((resource, name))

    def _enqueue(self, key: Key) -> None:
        if key not in self._queued:
            self._queued.add(key)
            self._queue.put_nowait(key)


def _circumstances(found: Object | None) -> object:
    """Return what decides, of an object, whether another try may end otherwise; no try changes it."""
    if found is None:
        return None
    is_attached = bool(found.get("status", {}).get("attachment"))
    return found["metadata"].get("generation"), is_going(found), is_attached


def create_request(found: Object) -> CreateVolume:
    """Return the request that an object stands for; the controller has checked what it cannot tell."""
    wanted = objects.wanted_volume(found)
    parameters = wanted.parameters
    return CreateVolume(
        name=wanted.name,
        wanted=CapacityRange(wanted.capacity_bytes, wanted.capacity_bytes),
        uses=(),
        asked=AskedParameters(
            pool=wanted.pool,
            bus=parameters.bus,
            queues=parameters.queues,
            queue_size=parameters.queue_size,
            block_size_bytes=parameters.block_size_bytes,
            throttle=wanted.throttle,
        ),
        source=wanted.source,
        requirement=None,
    )


def lock_keys(resource: Resource, found: Object, step: Step) -> Keys:
    """Return what a step excludes, as locks.keys_of does for the CSI call of the same kind."""
    name, spec = name_of(found), found["spec"]
    if step is Step.CREATE:
        source = spec.get("source") or {}
        if resource is SNAPSHOTS:
            source = {"kind": SourceKind.VOLUME.value, "id": spec["sourceVolumeId"]}
        return creation(name, **{f"of_{source['kind']}": source["id"]} if source else {})
    if resource is VOLUMES and step in {Step.DELETE, Step.EXPAND}:
        return change(name)
    return Keys(frozenset({name}))
