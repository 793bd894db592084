"""What the controller side needs of the agent: a part of csi_vduse.agent.client.AgentClient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from csi_vduse.agent.model import Attachment, Probe
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import NotFound


class Attachments(Protocol):
    """What is attached where a pool is; see proto/agent.proto. Every method may raise Unavailable."""

    async def list(self) -> Sequence[Attachment]:
        """Return every attachment of this node."""
        ...

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        """Hold the volume still for at most hold_s; fine if it is not attached."""
        ...

    async def resume(self, volume_id: str) -> None:
        """End the hold; fine if there is none."""
        ...

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        """Change how fast the volume may be; NotFound if it is not attached."""
        ...


class Agent(Attachments, Protocol):
    """The agent of a node."""

    async def probe(self) -> Probe:
        """Tell whether the agent can work."""
        ...


class NothingAttached:
    """Of pools that are on no node: nothing is attached where they are worked on."""

    async def list(self) -> Sequence[Attachment]:
        """Return nothing."""
        return ()

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        """Hold nothing."""

    async def resume(self, volume_id: str) -> None:
        """Hold nothing."""

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        """Find nothing to change."""
        del throttle
        raise NotFound(f"volume {volume_id!r} is not attached here")
