"""Attach: one function that makes a device, its worker and its bus binding, or leaves nothing behind.

Order (why: vdpa/bus.py and dataplane/device.py): record → CREATE_DEV → in-flight log → msg_timeout, bounce_size →
another export, recorded → worker, which sets the queues up and serves → DEV_NEW and bind → disk or character device →
a processor for interrupts → throttle → record.
The throttle comes late, and detach lifts it early: the kernel reads from a disk, and waits for its requests, under
the lock that all vDPA devices of the node share.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

from csi_vduse import log
from csi_vduse.agent.kernel import Kernel
from csi_vduse.agent.model import Attachment, AttachSpec, State
from csi_vduse.agent.store import Store
from csi_vduse.agent.workers import Worker, WorkerSource
from csi_vduse.config import AgentConfig, check_socket_path
from csi_vduse.dataplane import backend_spec, inflight, throttle
from csi_vduse.dataplane.backend_spec import ErrorBackend, NbdBackend, VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.inflight import LogIdentity
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.dataplane.vhost_user.net_offer import NetOffer, card_config
from csi_vduse.errors import AlreadyExists, FailedPrecondition
from csi_vduse.vdpa import interrupts
from csi_vduse.vdpa.model import Bus, BusDevice
from csi_vduse.vdpa.sysfs import Sysfs

T = TypeVar("T")

_PAGE_BYTES = 4096
# What a request takes of the bounce memory: its data, and a page each for header, status and descriptors.
_REQUEST_DATA_BYTES = 128 * 1024
_REQUEST_OVERHEAD_BYTES = 3 * _PAGE_BYTES
_MIN_BOUNCE_BYTES = 16 * 1024 * 1024
_MAX_BOUNCE_BYTES = 256 * 1024 * 1024


class BusBinder(Protocol):
    """What attach and detach need of the vDPA bus."""

    async def attach(self, name: str, bus: Bus, *, timeout_s: float) -> BusDevice:
        """Bind a served device; off the bus again if that fails."""

    async def detach(self, name: str, *, timeout_s: float) -> None:
        """Take a device off the bus."""


@dataclass(frozen=True)
class Node:
    """What attach and detach act on."""

    config: AgentConfig
    kernel: Kernel
    bus: BusBinder
    sysfs: Sysfs
    spawner: WorkerSource
    store: Store


def bounce_size_bytes(queues: int, queue_size: int) -> int:
    """Return how much bounce memory a disk gets: enough for full queues of ordinary requests, within bounds.

    Pages are allocated when first used and stay until the device goes; too few make the driver requeue
    requests, which is slow but no error.
    """
    wanted = queues * queue_size * (_REQUEST_DATA_BYTES + _REQUEST_OVERHEAD_BYTES)
    return max(_MIN_BOUNCE_BYTES, min(_MAX_BOUNCE_BYTES, wanted)) // _PAGE_BYTES * _PAGE_BYTES


def bounce_bytes_of(spec: AttachSpec) -> int:
    """Return the bounce memory of an attachment; 0 if it needs none."""
    # vhost_vdpa shares the guest's own memory.
    return bounce_size_bytes(spec.queues, spec.queue_size) if spec.bus is Bus.VIRTIO else 0


def device_spec(spec: AttachSpec) -> DeviceSpec:
    """Return the geometry of the device.

    Raises:
        InvalidArgument: the kernel or a driver would refuse it.
    """
    return DeviceSpec(
        name=spec.device_name,
        capacity_bytes=spec.capacity_bytes,
        block_size_bytes=spec.block_size_bytes,
        queues=spec.queues,
        queue_size=spec.queue_size,
        read_only=spec.read_only,
        packed=spec.packed,
        is_network=spec.is_network,
    )


async def attach(node: Node, spec: AttachSpec) -> tuple[Attachment, Worker]:
    """Attach a volume that is not attached; spec has no zeros left.

    Raises:
        AlreadyExists: a device of this name exists that is not ours.
        DataLoss: there is a record of it that cannot be read, for example of a later release.
        InvalidArgument: impossible geometry.
        NotFound, Unavailable, ProtocolError: a vhost-user server is not there, or not what it should be.
        FailedPrecondition, PermissionDenied, DeadlineExceeded: as the step that failed said.
    """
    (spec, geometry), name = await _meet(node, spec), spec.device_name
    if problem := node.kernel.problem():
        raise FailedPrecondition(f"no volume can be served on this node: {problem}")
    check_socket_path(node.store.control_path(name))
    node.store.find(name)  # one that we cannot read is not overwritten
    if node.sysfs.vduse_exists(name) or node.sysfs.vdpa_exists(name):
        raise AlreadyExists(
            f"a device named {name!r} exists that this agent did not make",
            hint="another program made it, or an agent with another run directory; see `csi-vduse doctor`",
        )
    async with AsyncExitStack() as undo:
        attachment = Attachment(spec, State.ATTACHING)
        undo.callback(_forget_if_gone, node, attachment)
        node.store.save(attachment)
        await node.kernel.create(geometry)
        undo.push_async_callback(node.kernel.destroy, name)
        inflight.create(node.store.inflight_path(name), _log_identity(node, spec))
        _tune(node, spec)
        attachment, worker = await start_worker(node, attachment, undo)

        async def replacement() -> Worker:
            nonlocal attachment
            attachment, started = await start_worker(node, attachment, undo, resume=True)
            return started

        binding = node.bus.attach(name, spec.bus, timeout_s=node.config.step_timeout_s)
        device, worker = await while_served(worker, binding, replacement)
        undo.push_async_callback(node.bus.detach, name, timeout_s=node.config.step_timeout_s)
        if spec.bus is Bus.VIRTIO:
            interrupts.settle(node.sysfs, name)
        if spec.throttle != UNLIMITED:
            await set_throttle(node, worker, spec.throttle)
        attachment = replace(attachment, state=State.ATTACHED, device=device, worker_pid=worker.pid)
        node.store.save(attachment)
        undo.pop_all()
        return attachment, worker
    raise AssertionError("unreachable: an AsyncExitStack of ours swallows no exception")


async def _meet(node: Node, spec: AttachSpec) -> tuple[AttachSpec, DeviceSpec]:
    """See what the device is to show, which is what its vhost-user server shows if it has one.

    Returns the spec, with how such a server is used, and the geometry.

    Raises:
        NotFound, PermissionDenied, Unavailable, DeadlineExceeded, ProtocolError: as frontend.probe says.
        FailedPrecondition: the server does not fit what is asked for.
    """
    geometry = device_spec(spec)
    if not isinstance(spec.backend, VhostUserBackend):
        return spec, geometry
    _refuse_second_user(node, spec)
    if spec.is_network:
        return spec, await _meet_network(spec.backend, geometry)
    offer = await asyncio.to_thread(frontend.probe, spec.backend.socket)
    # Limits and packed rings are the engine's; and it keeps the log, or writes away, where the server does not.
    mediated = spec.backend.mediated or spec.packed or spec.throttle != UNLIMITED or not offer.keeps_log
    mediated = mediated or (spec.read_only and not offer.is_read_only)
    offer.check(read_only=spec.read_only, without_flush=spec.backend.without_flush, keeps_log=not mediated)
    asked = (spec.capacity_bytes, spec.block_size_bytes, spec.queues)
    found = (offer.capacity_bytes, offer.block_size_bytes, offer.queues)
    if asked[0] > found[0] or asked[1] != found[1] or asked[2] > found[2]:
        raise FailedPrecondition(
            f"the server at {spec.backend.socket} has {found[0]} bytes in blocks of {found[1]} and {found[2]} queues; "
            f"{asked[0]} in blocks of {asked[1]} and {asked[2]} queues are asked for"
        )
    if mediated:
        shown = (
            offer.mediated_features(spec.queues, read_only=spec.read_only, packed=spec.packed),
            offer.device_config(spec.queues, spec.capacity_bytes, pieces=spec.queue_size - 2),
        )
    else:
        shown = (
            offer.device_features(spec.queues),
            offer.device_config(spec.queues, spec.capacity_bytes),
        )
    spec = replace(spec, backend=replace(spec.backend, mediated=mediated))
    return spec, replace(geometry, shown=shown)


async def _meet_network(backend: VhostUserBackend, geometry: DeviceSpec) -> DeviceSpec:
    offer = await asyncio.to_thread(frontend.probe, backend.socket, NetOffer)
    offer.check(read_only=False, without_flush=True, keeps_log=False)
    return replace(geometry, shown=(offer.device_features(geometry.queues), card_config(geometry.name)))


def _refuse_second_user(node: Node, spec: AttachSpec) -> None:
    """See that no other volume of ours is on a server's socket: SPDK serves whoever connects, and all at once."""
    for name in node.store.names():
        other = node.store.find(name)
        if other is not None and name != spec.device_name and other.spec.backend == spec.backend:
            raise FailedPrecondition(
                f"volume {other.volume_id} is attached to the vhost-user server of volume {spec.volume_id}",
                hint="a server's disk has one user at a time; detach that one first",
            )


async def while_served(
    worker: Worker, act: Coroutine[Any, Any, T], replacement: Callable[[], Awaitable[Worker]]
) -> tuple[T, Worker]:
    """Do something that the kernel finishes only while a worker serves; one that dies meanwhile is replaced.

    Returns what came of it, and the worker that serves now.
    """
    task = asyncio.ensure_future(act)
    try:
        while True:
            ended = asyncio.ensure_future(worker.ended())
            await asyncio.wait({task, ended}, return_when=asyncio.FIRST_COMPLETED)
            ended.cancel()
            if task.done():
                return await task, worker
            log.get().error("a worker died while its device changed hands", pid=worker.pid)
            worker.close()
            worker = await replacement()
    finally:
        task.cancel()


async def start_worker(
    node: Node,
    attachment: Attachment,
    undo: AsyncExitStack,
    *,
    resume: bool = False,
    limits: Throttle = UNLIMITED,
    failing: bool = False,
) -> tuple[Attachment, Worker]:
    """Start a worker and hand it the device; it serves when this returns.

    limits: hold at once.
    resume: the device has been served before; what that worker had in flight is replayed before anything else.
    failing: fail every request, the replayed ones too, without the backend.

    Returns the attachment as it is recorded now, and the worker.
    """
    if not failing:
        attachment = await fence(node, attachment)
    worker = await node.spawner.spawn(node.store.control_path(attachment.device_name))
    undo.push_async_callback(worker.kill)
    await serve(node, attachment, worker, resume=resume, limits=limits, failing=failing)
    return attachment, worker


async def fence(node: Node, attachment: Attachment) -> Attachment:
    """See to it that nothing of earlier workers reaches the backend any more, where that takes another export.

    Of a file the lock sees to it. Returns the attachment with what the next worker is to serve from, which is recorded.

    Raises:
        DataLoss: the record cannot be read.
        NotFound, Unavailable, DeadlineExceeded: as renewal.renewed says.
    """
    asked = attachment.spec.backend
    if not isinstance(asked, NbdBackend) or not asked.control:
        return attachment
    # Here, because it imports gRPC, which the first process, that forks, must not (spawner.py).
    from csi_vduse.agent import renewal  # noqa: PLC0415

    # The record, not what the caller knows: a start that failed may have begun to use what it had recorded.
    recorded = node.store.find(attachment.device_name)
    served = recorded.renewed if recorded is not None else None
    attachment = replace(attachment, renewed=await renewal.renewed(asked, served))
    node.store.save(attachment)
    return attachment


async def prepare(node: Node, attachment: Attachment, worker: Worker) -> None:
    """Have an idle worker do what it can of a start while another one serves the device.

    Raises:
        DataLoss: it will not be able to serve: the in-flight log is not one that it reads.
    """
    with _log_of(node, attachment) as log_fd:
        await worker.call(
            {"op": "prepare", **_start_arguments(node, attachment)},
            [log_fd],
            timeout_s=node.config.step_timeout_s,
        )


async def serve(
    node: Node,
    attachment: Attachment,
    worker: Worker,
    *,
    resume: bool,
    limits: Throttle = UNLIMITED,
    failing: bool = False,
) -> None:
    """Hand an idle worker the device, which nobody else has open; see start_worker.

    The only other descriptor of the device is ours, and we close it before anything else happens: the kernel
    gives a dead worker's messages to the next one only when the last descriptor is closed.
    """
    with _log_of(node, attachment) as log_fd, ExitStack() as descriptors:
        device_fd = node.kernel.open(attachment.device_name)
        descriptors.callback(os.close, device_fd)
        await worker.call(
            {
                "op": "start",
                **_start_arguments(node, attachment),
                **({"backend": backend_spec.to_json(ErrorBackend())} if failing else {}),
                "throttle": throttle.to_json(limits),
                "resume": resume,
            },
            [device_fd, log_fd],
            timeout_s=node.config.step_timeout_s,
        )


def _start_arguments(node: Node, attachment: Attachment) -> dict[str, Any]:
    spec = attachment.spec
    return {
        "name": spec.device_name,
        "volume_id": spec.volume_id,
        "serial": spec.disk_serial,
        "backend": backend_spec.to_json(attachment.backend),
        "capacity_bytes": spec.capacity_bytes,
        "read_only": spec.read_only,
        "queues": spec.queues,
        "queue_size": spec.queue_size,
        "block_size_bytes": spec.block_size_bytes,
        "packed": spec.packed,
        "is_network": spec.is_network,
        "inflight": _log_identity(node, spec).to_json(),
    }


@contextmanager
def _log_of(node: Node, attachment: Attachment) -> Iterator[int]:
    fd = os.open(node.store.inflight_path(attachment.device_name), os.O_RDWR | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


async def set_throttle(node: Node, worker: Worker, limits: Throttle) -> None:
    """Have a worker take limits up."""
    message = {"op": "throttle", "throttle": throttle.to_json(limits)}
    await worker.call(message, timeout_s=node.config.step_timeout_s)


async def set_capacity(node: Node, worker: Worker, capacity_bytes: int) -> None:
    """Have a worker tell its driver about a capacity; FailedPrecondition if the backend has less."""
    message = {"op": "resize", "capacity_bytes": capacity_bytes}
    await worker.call(message, timeout_s=node.config.step_timeout_s)


def _log_identity(node: Node, spec: AttachSpec) -> LogIdentity:
    folder = node.sysfs.vduse_dir(spec.device_name)
    server = isinstance(spec.backend, VhostUserBackend) and not spec.backend.mediated
    return LogIdentity.of(folder, queues=spec.queues, queue_size=spec.queue_size, server=server)


def set_msg_timeout(node: Node, spec: AttachSpec) -> None:
    """Tell the kernel how long it waits for a worker's answer before it gives the device up."""
    virtio = spec.bus is Bus.VIRTIO
    timeout_s = node.config.msg_timeout_s if virtio else node.config.vhost_msg_timeout_s
    node.kernel.set_attribute(spec.device_name, "msg_timeout", timeout_s)


def _tune(node: Node, spec: AttachSpec) -> None:
    set_msg_timeout(node, spec)
    if spec.bus is Bus.VIRTIO:
        node.kernel.set_attribute(spec.device_name, "bounce_size", bounce_bytes_of(spec))


def _forget_if_gone(node: Node, attachment: Attachment) -> None:
    """Last step of the undo: if an earlier step failed, keep the record so that detach can finish."""
    name = attachment.device_name
    if node.sysfs.vdpa_exists(name) or node.sysfs.vduse_exists(name):
        log.get().error(
            "an attach failed and could not be undone; detach will", volume_id=attachment.volume_id
        )
        node.store.save(replace(attachment, state=State.DETACHING, state_reason="left by a failed attach"))
        return
    node.store.forget(name)
