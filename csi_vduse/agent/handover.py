"""Handover: a volume gets a new worker while its old one is alive, for upgrades.

Order: fork the new worker and let it prepare, while the old one serves → the old one stops fetching, waits for what
is in flight, closes backend and device (one that had to be killed is fenced as any dead one) → the new one opens both,
and goes on where the in-flight log says that fetching ended → it listens where workers of this device do → the old one
ends.

Kept true:
- What is slow comes before the old worker stops. The application waits for the drain and for one start.
- The device is closed and opened again, its descriptor is never passed on: with the last close the kernel takes
  back messages that were read and not answered, and a copy left with the old worker would stop that
  (vduse_dev_release in drivers/vdpa/vdpa_user/vduse_dev.c).
- Until the new worker serves, the old one can go on, and does if the new one fails.
- Killed at any point, we leave one worker that serves or none: idle ones end with our connection to them. A worker
  that serves under the new path only is found there by the next agent.
"""

from __future__ import annotations

import time
from contextlib import AsyncExitStack

from csi_vduse import log
from csi_vduse.agent.attach import Node, fence, prepare, serve
from csi_vduse.agent.model import Attachment
from csi_vduse.agent.workers import Worker
from csi_vduse.errors import DataLoss, DeadlineExceeded, FailedPrecondition, Unavailable, VduseError

# The old worker drains for at most 5 s (DRAIN_TIMEOUT_S); the rest is for a busy machine.
_RELEASE_TIMEOUT_S = 30.0


async def handover(node: Node, attachment: Attachment, old: Worker) -> tuple[Attachment, Worker, float]:
    """Replace the worker of an attached volume.

    Returns the attachment as it is recorded now, the new worker, and for how many seconds none served. The caller lets
    the old one end. If this fails the old worker serves as before, unless it is dead.

    Raises:
        FailedPrecondition: the new worker does not read the volume's in-flight log, or the device is broken.
        Unavailable: what is in flight did not end in time, or the new worker died.
        Pending: the volume's requests are held.
    """
    name = attachment.device_name
    async with AsyncExitStack() as of_the_old:
        async with AsyncExitStack() as undo:
            new = await node.spawner.spawn(node.store.next_control_path(name))
            undo.push_async_callback(new.kill)
            try:
                await prepare(node, attachment, new)
            except DataLoss as error:
                raise FailedPrecondition(
                    f"volume {attachment.volume_id} cannot be handed over: {error.message}", hint=error.hint
                ) from error
            began = time.monotonic()
            if await _release(old):
                of_the_old.push_async_callback(_go_on, node, attachment, old)
            else:
                attachment = await fence(node, attachment)
            await serve(node, attachment, new, resume=True, limits=attachment.spec.throttle)
            pause_s = time.monotonic() - began
            new.listen_at(node.store.control_path(name))
            undo.pop_all()
        of_the_old.pop_all()
    return attachment, new, pause_s


async def _release(old: Worker) -> bool:
    """Have the old worker let go; False if it is dead, which comes to the same.

    Raises:
        Unavailable: it still has requests in flight, and goes on.
    """
    if old.hello is None or not old.hello.can_hand_over:
        # It does not know how to let go: it is replaced as one that died is, from the in-flight log.
        await old.kill()
        return False
    try:
        answer = await old.call({"op": "release"}, timeout_s=_RELEASE_TIMEOUT_S)
    except DeadlineExceeded:
        log.get().error("a worker does not let go of its device; it is killed", pid=old.pid)
        await old.kill()
        return False
    except Unavailable:
        if old.alive:
            await old.kill()  # it may be ending
        return False
    if not answer["released"]:
        raise Unavailable(
            "requests in flight do not end; the old worker goes on",
            hint="the backend is slow or away; retry when it is back",
        )
    return True


async def _go_on(node: Node, attachment: Attachment, old: Worker) -> None:
    """Give the device back to the worker that had it; one that cannot go on ends, and is revived as any dead one.

    The new worker may have begun to serve before it failed, so it is fenced.
    """
    try:
        attachment = await fence(node, attachment)
        await serve(node, attachment, old, resume=True, limits=attachment.spec.throttle)
    except VduseError as error:
        log.get().error("the old worker cannot go on", volume_id=attachment.volume_id, error=str(error))
        await old.kill()
    else:
        log.get().warning("a handover failed; the old worker goes on", volume_id=attachment.volume_id)
