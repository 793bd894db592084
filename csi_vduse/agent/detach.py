"""Detach: refuse while the device is in use, then unbind, end the worker, destroy the device, forget it.

Kept true:
- A device is unbound only while a worker serves it: without one that would hang, in a place of the kernel that
  cannot be interrupted. A dead worker is replaced first, and one that dies meanwhile too. A device that the kernel has
  given up needs none.
- An unbind that hung goes on when a worker serves again; the device is not taken off the bus before it has ended.
- Every step is fine if it was done before, so a detach that failed or was killed is finished by the next one.
- While a disk is being removed we hold it exclusively: nobody mounts it between the look and the act.
- Its limits end first: who only reads it for a moment (udev) would not come to an end with them. They are back if it
  stays.
- By force, a device that has users goes too, and its backend is not waited for: another worker fails everything that
  waits, and what comes after it, so that the kernel can let the disk go. Whether forced is recorded first: a next
  agent goes on in the same way.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace

from csi_vduse import log
from csi_vduse.agent.attach import Node, set_throttle, start_worker, while_served
from csi_vduse.agent.bounded import bounded
from csi_vduse.agent.model import Attachment, Bus, State
from csi_vduse.agent.workers import Worker
from csi_vduse.dataplane.throttle import UNLIMITED
from csi_vduse.errors import DeadlineExceeded, DeviceBroken, FailedPrecondition, VduseError
from csi_vduse.vdpa.model import BusDevice

# Tools that look for changes open a disk for a moment.
_OPENERS_GRACE_S = 5.0
# udev does after every change; it goes by itself, nobody can be told to end it, and a busy machine has it wait.
_UDEV_GRACE_S = 30.0
_UDEV = ("(udev-worker)", "(systemd-udevd)", "(udevd)")
_POLL_S = 0.1
_STOP_TIMEOUT_S = 20.0


async def detach(
    node: Node,
    attachment: Attachment,
    worker: Worker | None,
    *,
    adopt: Callable[[Worker], None],
    force: bool = False,
) -> None:
    """Remove an attachment from this node.

    worker: the living worker, or None.
    adopt: called with a worker that had to be started; its caller owns it if this fails.
    force: fail what waits, and take the disk away even from those who use it.

    Raises:
        FailedPrecondition: the device is in use.
        DeadlineExceeded: a step hung; calling again continues.
    """
    name = attachment.device_name
    attachment = replace(attachment, forced=attachment.forced or force)

    async def replacement() -> Worker:
        nonlocal attachment
        async with AsyncExitStack() as undo:
            attachment, started = await start_worker(
                node, attachment, undo, resume=True, failing=attachment.forced
            )
            undo.pop_all()
        adopt(started)
        return started

    look_first = False
    if attachment.forced and node.sysfs.is_held_by_driver(name):
        if attachment.spec.bus is Bus.VHOST:
            await _refuse_if_used(node, attachment)  # vhost_vdpa waits for who has it open, whatever we do
        node.store.save(replace(attachment, state=State.DETACHING, state_reason="by force"))
        if worker is not None:
            await _end(worker)
        worker = await replacement()
        log.get().warning("a volume is detached by force: its requests fail", volume_id=attachment.volume_id)
    elif node.sysfs.is_held_by_driver(name):
        if worker is None or not worker.alive:
            # What the dead one left is finished first: who has the disk open may only wait for that.
            worker = await _unless_given_up(node, attachment, replacement)
        look_first = True
    async with AsyncExitStack() as undo:
        if worker is not None and attachment.spec.throttle != UNLIMITED:
            undo.push_async_callback(_limit_again, node, attachment, worker)
            await set_throttle(node, worker, UNLIMITED)
        if look_first:
            await _refuse_if_used(node, attachment)
        async with _claimed(node, attachment):
            pid = worker.pid if worker is not None else 0
            attachment = replace(attachment, state=State.DETACHING, worker_pid=pid)
            node.store.save(attachment)
            unbinding = node.bus.detach(name, timeout_s=node.config.step_timeout_s)
            if worker is None:
                await unbinding
            else:
                _, worker = await while_served(worker, unbinding, replacement)
        undo.pop_all()
    if worker is not None:
        await worker.stop(timeout_s=_STOP_TIMEOUT_S)
    await node.kernel.destroy(name)
    node.store.forget(name)


async def _limit_again(node: Node, attachment: Attachment, worker: Worker) -> None:
    """Put the limits in force again; a worker that has died meanwhile has a successor that knows them from the record."""
    try:
        await set_throttle(node, worker, attachment.spec.throttle)
    except VduseError as error:
        log.get().warning("limits are not in force again", volume_id=attachment.volume_id, error=str(error))


async def _unless_given_up(
    node: Node, attachment: Attachment, replacement: Callable[[], Awaitable[Worker]]
) -> Worker | None:
    """Start a worker; None for a device that the kernel has given up: nobody can serve it, and it answers for itself.

    Raises:
        FailedPrecondition: requests wait in such a device; to remove it would wait for them for ever.
    """
    try:
        return await replacement()
    except DeviceBroken as error:
        if waiting := node.sysfs.requests_in_flight(attachment.device_name):
            raise FailedPrecondition(
                f"{waiting} requests of volume {attachment.volume_id} wait in a device that the kernel gave up",
                hint="only a reboot ends them",
            ) from error
        return None


async def _end(worker: Worker) -> None:
    """End a worker whose backend may hang; what it must do is to close the device."""
    with contextlib.suppress(VduseError):
        await worker.call({"op": "release", "abandon": True}, timeout_s=_STOP_TIMEOUT_S)
    try:
        await worker.kill()
    except DeadlineExceeded as error:
        log.get().error("a worker is left behind, stuck in the kernel", pid=worker.pid, error=str(error))


async def _refuse_if_used(node: Node, attachment: Attachment) -> None:
    name, device = attachment.device_name, node.sysfs.find(attachment.device_name, attachment.spec.bus)
    if device is None or attachment.spec.is_network:
        return
    if points := node.sysfs.mount_points(name):
        raise FailedPrecondition(
            f"{device.path} of volume {attachment.volume_id} is mounted at {', '.join(points)}",
            hint="unmount it first",
        )
    if holders := node.sysfs.holders(name):
        raise FailedPrecondition(
            f"{device.path} of volume {attachment.volume_id} is used by {', '.join(holders)}",
            hint="remove that device first",
        )
    began = time.monotonic()
    while openers := await _openers(node, device):
        only_udev = all(any(udev in each for udev in _UDEV) for each in openers)
        if time.monotonic() > began + (_UDEV_GRACE_S if only_udev else _OPENERS_GRACE_S):
            raise FailedPrecondition(
                f"{device.path} of volume {attachment.volume_id} is held open by {', '.join(openers)}",
                hint="end these processes first",
            )
        await asyncio.sleep(_POLL_S)


async def _openers(node: Node, device: BusDevice) -> list[str]:
    """Look who has it open: not in the event loop, for there is a look into every process of the node."""
    return await bounded(
        f"looking who has {device.path} open",
        functools.partial(node.sysfs.openers, device),
        timeout_s=node.config.step_timeout_s,
        undo=lambda _: None,
    )


@asynccontextmanager
async def _claimed(node: Node, attachment: Attachment) -> AsyncIterator[None]:
    name = attachment.device_name
    device = node.sysfs.find_disk(name) if attachment.spec.bus is Bus.VIRTIO else None
    # Without a driver the disk is on its way out, and nobody can open it any more.
    going = node.sysfs.driver(name) is None
    if attachment.forced or going or device is None or not device.path.exists():
        yield
        return
    fd = await bounded(
        f"claiming {device.path}",
        functools.partial(node.sysfs.claim_disk, device),
        timeout_s=node.config.step_timeout_s,
        undo=os.close,
    )
    try:
        yield
    finally:
        os.close(fd)
