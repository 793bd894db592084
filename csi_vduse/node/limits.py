"""The limits of a volume are for its users: what the node does with it by itself is not slowed down by them.

A volume is attached without limits, and has them when it is staged; they are lifted while it grows, and before it is
unmounted. What the agent's record says is in force, whatever dies: a next agent or worker knows no other. A call that
dies with limits lifted is made again, and then puts those of the volume in force.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from csi_vduse import log
from csi_vduse.agent.model import Attachment
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.errors import VduseError
from csi_vduse.node.context import NodeContext


async def lift(
    node: NodeContext, attachment: Attachment, undo: AsyncExitStack, *, otherwise: Throttle = UNLIMITED
) -> None:
    """Lift the limits of a volume; `undo` puts them in force again.

    Args:
        node: for the agent.
        attachment: the volume's.
        undo: of the caller.
        otherwise: what is put in force if there are none: a call that died may have lifted them.

    Raises:
        VduseError: as the agent says.
    """
    before = attachment.spec.throttle
    after = otherwise if before == UNLIMITED else before
    if after == UNLIMITED:
        return

    async def restore() -> None:
        try:
            await node.agent.throttle(attachment.volume_id, after)
        except VduseError as error:
            log.get().error("limits are not in force again", volume_id=attachment.volume_id, error=str(error))

    undo.push_async_callback(restore)
    if before != UNLIMITED:
        await node.agent.throttle(attachment.volume_id, UNLIMITED)
