"""What the controller side needs of the agent: a part of csi_vduse.agent.client.AgentClient."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from csi_vduse.agent.model import Attachment, Probe
from csi_vduse.dataplane.throttle import Throttle


class Agent(Protocol):
    """See proto/agent.proto for what each call promises. Every method may raise Unavailable."""

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

    async def probe(self) -> Probe:
        """Tell whether the agent can work."""
        ...
