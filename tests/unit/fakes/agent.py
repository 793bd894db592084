"""An agent in memory for tests of the controller: attachments without devices, holds without workers.

Honest where it matters: a hold is counted, ends by itself after hold_s and with its worker, and is refused by a
dead worker or beyond 300 s, as the real agent does. `events` tells what happened in which order.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field, replace

from csi_vduse.agent.model import Attachment, AttachSpec, Probe, State
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import AlreadyExists, InvalidArgument, NotFound, Unavailable, VduseError

MAX_HOLD_S = 300.0


@dataclass
class FakeAgent:
    """See the module; `fail` makes the named call raise."""

    attachments: dict[str, Attachment] = field(default_factory=dict)
    events: list[str] = field(default_factory=list)
    fail: dict[str, VduseError] = field(default_factory=dict)
    held_until_s: dict[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()

    async def attach(self, spec: AttachSpec) -> Attachment:
        self._called("attach", spec.volume_id)
        spec = spec.with_defaults(queues=1)
        present = self.attachments.get(spec.volume_id)
        if present is not None and present.spec != spec:
            raise AlreadyExists("attached with other settings")
        attachment = present or Attachment(spec, State.ATTACHED, worker_pid=1)
        self.attachments[spec.volume_id] = attachment
        return attachment

    async def detach(self, volume_id: str) -> None:
        self._called("detach", volume_id)
        self.attachments.pop(volume_id, None)

    async def resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        self._called("resize", volume_id)
        if volume_id not in self.attachments:
            raise NotFound(f"{volume_id} is not attached")
        attachment = self.attachments[volume_id]
        grown = replace(attachment, spec=replace(attachment.spec, capacity_bytes=capacity_bytes))
        self.attachments[volume_id] = grown
        return grown

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        self._called("throttle", volume_id)
        if volume_id not in self.attachments:
            raise NotFound(f"{volume_id} is not attached")
        attachment = self.attachments[volume_id]
        throttled = replace(attachment, spec=replace(attachment.spec, throttle=throttle))
        self.attachments[volume_id] = throttled
        return throttled

    async def list(self) -> tuple[Attachment, ...]:
        self._called("list")
        return tuple(self.attachments.values())

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        self._called("quiesce", volume_id)
        if not 0 < hold_s <= MAX_HOLD_S:
            raise InvalidArgument(f"cannot hold for {hold_s} s")
        attachment = self.attachments.get(volume_id)
        if attachment is None:
            return
        if attachment.state is State.WORKER_DEAD:
            raise Unavailable("the worker is dead")
        self.held_until_s[volume_id] = time.monotonic() + hold_s

    async def resume(self, volume_id: str) -> None:
        self._called("resume", volume_id)
        self.held_until_s.pop(volume_id, None)

    async def probe(self) -> Probe:
        self._called("probe")
        return Probe("test", not self.problems, self.problems, max_volumes=16)

    def is_held(self, volume_id: str) -> bool:
        return self.held_until_s.get(volume_id, 0.0) > time.monotonic()

    def set_state(self, volume_id: str, state: State) -> None:
        pid = 1 if state is State.ATTACHED else 0
        self.attachments[volume_id] = replace(self.attachments[volume_id], state=state, worker_pid=pid)

    def replace_worker(self, volume_id: str) -> None:
        """As when one dies and the reviver starts another, which knows of no hold."""
        attachment = self.attachments[volume_id]
        self.attachments[volume_id] = replace(attachment, worker_pid=attachment.worker_pid + 1)
        self.held_until_s.pop(volume_id, None)

    def _called(self, name: str, volume_id: str = "") -> None:
        self.events.append(f"{name} {volume_id}".strip())
        if name in self.fail:
            raise self.fail[name]
