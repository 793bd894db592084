"""What changes of a volume while it is attached: its capacity, and how fast it may be.

Kept true: a change is recorded before the worker hears of it, so that the next worker knows no less than the driver was
told by this one. The caller has the volume for itself.
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

from csi_vduse.agent.attach import Node, device_spec, set_capacity, set_throttle
from csi_vduse.agent.attachments import Attachments
from csi_vduse.agent.model import Attachment, Bus
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, OutOfRange, Unavailable

_SEEN_TIMEOUT_S = 10.0
_POLL_S = 0.02


async def resize(node: Node, volumes: Attachments, volume_id: str, capacity_bytes: int) -> None:
    """Tell the driver about a capacity, and wait until the disk shows it; see Agent.resize."""
    attachment = volumes.require(volume_id)
    grown = replace(attachment, spec=replace(attachment.spec, capacity_bytes=capacity_bytes))
    device_spec(grown.spec)
    before = attachment.spec.capacity_bytes
    if capacity_bytes < before:
        raise OutOfRange(f"volume {volume_id} of {before} bytes cannot shrink to {capacity_bytes}")
    worker = volumes.workers.get(volume_id)
    if worker is None:
        raise Unavailable(f"the worker of volume {volume_id} is dead")
    # A worker that knew less than its driver would refuse requests. More does no harm.
    volumes.record(grown)
    try:
        await set_capacity(node, worker, capacity_bytes)
    except FailedPrecondition:  # it refused: the driver has not heard of it
        volumes.record(attachment)
        raise
    if attachment.spec.bus is Bus.VIRTIO:
        await _wait_for_capacity(node, grown)


async def throttle(node: Node, volumes: Attachments, volume_id: str, limits: Throttle) -> None:
    """Have a volume's worker take limits up, if it has one; see Agent.throttle."""
    attachment = volumes.require(volume_id)
    volumes.record(replace(attachment, spec=replace(attachment.spec, throttle=limits)))
    worker = volumes.workers.get(volume_id)
    if worker is not None:
        await set_throttle(node, worker, limits)


async def _wait_for_capacity(node: Node, attachment: Attachment) -> None:
    """Wait for the driver, which takes the capacity up a moment after the interrupt."""
    deadline = time.monotonic() + _SEEN_TIMEOUT_S
    while True:
        seen = node.sysfs.disk_capacity_bytes(attachment.device_name)
        if seen is None or seen >= attachment.spec.capacity_bytes:
            return
        if time.monotonic() > deadline:
            raise DeadlineExceeded(
                f"{attachment.path} still has {seen} bytes instead of {attachment.spec.capacity_bytes}",
                hint="retry; if it stays so, see the kernel log",
            )
        await asyncio.sleep(_POLL_S)
