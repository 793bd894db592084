"""A device whose rings a vhost-user server works on: it gets the driver's memory, and kicks go to it directly.

What is left for us is the server's life (server_session.py), to hand on its interrupts (src/relay.c), and to see to it
that a server that died is followed by one that goes on where it was.

Kept true:
- A ring is started with the place where its used ring ends, and with the in-flight log that whoever worked on it kept:
  what a dead server had taken and not returned the next one does again. Nobody else writes to that log.
- The driver is interrupted, and the server kicked, once more after each start: for what came between two servers.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

from csi_vduse.dataplane._engine import ffi, lib
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Failure, QueueAddress, Region
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.dataplane.vhost_user.relayed import Memory, Ring, ServerLog
from csi_vduse.dataplane.vhost_user.server_session import ServerSession
from csi_vduse.errors import FailedPrecondition, VduseError


class Relay(ServerSession):
    """In place of an Engine; arguments as of ServerSession, server_log of this device if it is a disk."""

    def __init__(
        self,
        backend: VhostUserBackend,
        spec: DeviceSpec,
        *,
        server_log: ServerLog | None,
        dial: Callable[[], Any],
        event_fd: int,
    ) -> None:
        own_log = None if server_log is None else ServerLog(os.dup(server_log.fd), server_log.place)
        super().__init__(backend, spec, dial=dial, event_fd=event_fd, server_log=own_log)
        relay = ffi.new("struct vd_relay **")
        if (result := lib.vd_relay_new(relay)) < 0:
            raise VduseError(f"the relay of interrupts cannot start: {os.strerror(-result)}")
        self._interrupts = relay[0]
        self.begin()

    # The rings' owner

    def features_of(self, _offer: Offer) -> int:
        """What the driver negotiated."""
        return self._features

    def check(self, offer: Offer) -> None:
        """Refuse a server that lacks features that the driver uses."""
        if lacking := self._features & ~offer.device_features(self._spec.queues):
            raise FailedPrecondition(f"the server lacks features {lacking:#x} that the driver uses")

    def base_of(self, ring: Ring) -> int:
        """Where the used ring ends."""
        return self._given.used_index(ring.address)

    def started(self, ring: Ring) -> None:
        """Make up for what nobody was kicked or interrupted for."""
        os.eventfd_write(ring.kick_fd, 1)
        os.eventfd_write(ring.call_fd, 1)

    # As an Engine

    def set_regions(self, regions: Sequence[Region]) -> None:
        """Replace the address map; queues must be stopped or paused."""
        self.set_memory(Memory.of(regions))

    def start_queue(self, index: int, address: QueueAddress) -> None:
        """Have the server work on a queue, as soon as it is there."""
        ring = Ring.of(index, address)
        queue = {
            "call_fd": ring.call_fd,
            "notify_fd": address.notify_fd,
            "notify_ioctl": address.notify_ioctl,
        }
        result = lib.vd_relay_watch(self._interrupts, index, ffi.new("struct vd_relay_queue *", queue))
        if result < 0:
            ring.close()
            raise VduseError(f"interrupts of queue {index} cannot be relayed: {os.strerror(-result)}")
        self.add_ring(ring, address.features)

    def stop_queue(self, index: int, timeout_s: float) -> bool:
        """Take a queue from the server; False if that may still be at the driver's memory after timeout_s."""
        if index not in self._rings:
            return True
        stopped = self.unwant_ring(index, timeout_s)
        lib.vd_relay_unwatch(self._interrupts, self._rings[index].call_fd)
        self.remove_ring(index)
        return stopped

    def pause_queue(self, index: int, timeout_s: float) -> bool:
        """Have the server finish a queue's requests and take no others; False if some are in flight after timeout_s."""
        self.unwant_ring(index, timeout_s)
        with self._changed:
            return self._rings[index].drained and not self._rings[index].served

    def resume_queue(self, index: int) -> None:
        """Have the server take requests again, with the address map of now."""
        self.want_ring(index)

    def queue_state(self, index: int) -> int:
        """Return how far a queue is: where it stopped, or how many of its requests have ended."""
        with self._changed:
            ring = self._rings.get(index)
            if ring is None:
                return 0
            return self._given.used_index(ring.address) if ring.served else ring.base

    def set_capacity(self, capacity_bytes: int) -> None:
        """See that the server's disk has so many bytes; raises as check_capacity."""
        self.check_capacity(capacity_bytes)

    def set_throttle(self, throttle: Throttle) -> None:
        """Accept only that there are no limits: requests do not pass through here.

        Raises:
            FailedPrecondition: there are.
        """
        if throttle != UNLIMITED:
            raise FailedPrecondition(
                "a volume that a vhost-user server serves cannot be limited here",
                hint="limit it there (SPDK: bdev_set_qos_limit)",
            )

    def abandoned_queues(self) -> int:
        """Return 0: a server that does not let go of a queue costs the device (ServedDevice)."""
        return 0

    def faults(self) -> dict[int, str]:
        """Return nothing: rings are the server's to look at."""
        return {}

    def failure(self) -> Failure | None:
        """Return nothing: requests do not pass through here."""
        return None

    def waiting(self) -> int:
        """Return 0: nobody here counts requests."""
        return 0

    def stats(self) -> dict[str, Any]:
        """What can be counted here, in the shape of VolumeStats in agent.proto."""
        interrupts = int(lib.vd_relay_interrupts(self._interrupts))
        return {"interrupts": interrupts, "remote": self.remote_stats(), "grown_bytes": self.grown_bytes()}

    def close(self) -> None:
        """Let go of the server and of the memory; queues that it still works on are cut off."""
        self.end()
        lib.vd_relay_free(self._interrupts)
        if self._server_log is not None:
            os.close(self._server_log.fd)
