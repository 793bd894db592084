"""A device whose rings the engine works on, and whose requests go on to a vhost-user server: its backend "vhost-user".

The engine fetches, logs, throttles and counts as for every back end, and puts a request into a ring of its own that the
server works on (src/backends/vhost); the data stays where the driver has it. What is left for us is the server's life.

Kept true: a server is given a ring only when its queue has let go of what another server had; then it begins at the
ring's beginning. A server that answers what it was not asked is left.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import BackendStatus, Engine, Failure, QueueAddress, Region
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.dataplane.vhost_user.relayed import Memory, Ring
from csi_vduse.dataplane.vhost_user.server_session import ServerSession
from csi_vduse.errors import FailedPrecondition, Unavailable

_LET_GO_S: Final = 5.0
_LOOK_S: Final = 0.001
# What our rings and requests use of a server's features.
_USED: Final = (
    config_space.F_VERSION_1
    | config_space.F_INDIRECT_DESC
    | config_space.F_MQ
    | config_space.F_BLK_SIZE
    | config_space.F_SEG_MAX
    | config_space.F_FLUSH
    | config_space.F_DISCARD
    | config_space.F_WRITE_ZEROES
)
_LIMITING: Final = config_space.F_DISCARD | config_space.F_WRITE_ZEROES | config_space.F_FLUSH


class Mediator(ServerSession):
    """In place of an Engine, with one inside; arguments as of ServerSession, and the engine, which is ours from here."""

    def __init__(
        self,
        engine: Engine,
        backend: VhostUserBackend,
        spec: DeviceSpec,
        *,
        dial: Callable[[], Any],
        event_fd: int,
    ) -> None:
        super().__init__(backend, spec, dial=dial, event_fd=event_fd)
        self._engine = engine
        self._server = 0
        self.begin()

    # The rings' owner

    def features_of(self, offer: Offer) -> int:
        """What is used of what the server has; not what the driver negotiated, which is the engine's."""
        return offer.features & _USED

    def check(self, offer: Offer) -> None:
        """Refuse a server that lacks what requests of the driver need."""
        if lacking := self._features & _LIMITING & ~offer.features:
            raise FailedPrecondition(f"the server lacks features {lacking:#x} that the driver uses")
        if not offer.features & config_space.F_INDIRECT_DESC:
            raise FailedPrecondition("the vhost-user server takes no indirect descriptors")

    def base_of(self, ring: Ring) -> int:
        """The beginning, when the queue has let go of the ring."""
        deadline = time.monotonic() + _LET_GO_S
        while self._engine.server_of(ring.index):
            if time.monotonic() > deadline:
                raise Unavailable(f"queue {ring.index} does not let go of the last server's ring")
            time.sleep(_LOOK_S)
        return 0

    def started(self, ring: Ring) -> None:
        """Let the queue post what waits."""
        self._server += 1
        self._engine.serve_by(ring.index, self._server)

    def stopped(self, ring: Ring) -> None:
        """Have the queue take back what was posted and not answered."""
        self._engine.serve_by(ring.index, 0)

    # As an Engine

    def set_regions(self, regions: Sequence[Region]) -> None:
        """Replace the address map; queues must be stopped or paused."""
        self._engine.set_regions(regions)
        self.set_memory(Memory.of([*regions, self._engine.server_region()]))

    def start_queue(self, index: int, address: QueueAddress) -> None:
        """Start serving a queue, and have a server work on its other ring as soon as it is there."""
        self._engine.start_queue(index, address)
        ours, call_fd = self._engine.server_ring(index)
        self.add_ring(Ring(index, ours, os.dup(ours.kick_fd), os.dup(call_fd), wanted=True), address.features)

    def stop_queue(self, index: int, timeout_s: float) -> bool:
        """Stop a queue; False if a server may still be at the driver's memory after timeout_s."""
        drained = self._engine.stop_queue(index, timeout_s)
        if index not in self._rings:
            return drained
        left = self.unwant_ring(index, timeout_s)
        self.remove_ring(index)
        return drained or left

    def pause_queue(self, index: int, timeout_s: float) -> bool:
        """Stop fetching; False if requests are still in flight after timeout_s."""
        return self._engine.pause_queue(index, timeout_s)

    def resume_queue(self, index: int) -> None:
        """Fetch again, with the address map of now."""
        self._engine.resume_queue(index)

    def queue_state(self, index: int) -> int:
        """Return how far a queue is."""
        return self._engine.queue_state(index)

    def set_capacity(self, capacity_bytes: int) -> None:
        """Change what the driver may address; raises as check_capacity."""
        self.check_capacity(capacity_bytes)
        self._engine.set_capacity(capacity_bytes)

    def set_throttle(self, throttle: Throttle) -> None:
        """Change the limits; at any time."""
        self._engine.set_throttle(throttle)

    def abandoned_queues(self) -> int:
        """Return how many queues were stopped without waiting and have not ended yet."""
        return self._engine.abandoned_queues()

    def faults(self) -> dict[int, str]:
        """Return the queues that wait for a reset, and why."""
        return self._engine.faults()

    def failure(self) -> Failure | None:
        """Return the newest request that failed or has to wait."""
        return self._engine.failure()

    def waiting(self) -> int:
        """Return how many requests wait for a backend that is full or away."""
        return self._engine.waiting()

    def backend_status(self) -> BackendStatus:
        """Return how the connection is; a server that lies loses it here, where the engine has us look."""
        if any(self._engine.server_lies(index) for index in list(self._rings)):
            self.leave("the vhost-user server answered a request that it did not have")
        return super().backend_status()

    def stats(self) -> dict[str, Any]:
        """The engine's counters, and the connection's."""
        return self._engine.stats() | {"remote": self.remote_stats(), "grown_bytes": self.grown_bytes()}

    def close(self) -> None:
        """Let go of the server, the backend and the memory."""
        self.end()
        self._engine.close()
