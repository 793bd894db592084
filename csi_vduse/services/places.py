"""Where volumes are and what room there is, as the controller answers it: for pools of this process, or of many nodes.

`LocalPlaces` is the one of `standalone`; nodes_view.py has the one of a Kubernetes cluster.
"""

from __future__ import annotations

from typing import Protocol

from csi_vduse.backends.pools import Pools
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.validation import GetCapacity
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.policy import is_shared, objection
from csi_vduse.volumes.topology import Segments, includes


class Places(Protocol):
    """What the controller asks; any method may raise Unavailable."""

    def segments(self, volume: Volume) -> Segments:
        """Return the one place that a volume can be used from."""
        ...

    async def problem(self, volume: Volume) -> str:
        """Say what is wrong with a volume's data, or nothing."""
        ...

    async def room(self, asked: GetCapacity) -> list[int]:
        """Return what may still be promised in each pool that such a volume could go to, in bytes."""
        ...


class LocalPlaces:
    """The pools of this process, all at one place.

    Args:
        pools: these.
        reservations: knows what room is left.
        segments: the place.
    """

    def __init__(self, *, pools: Pools, reservations: Reservations, segments: Segments) -> None:
        self._pools = pools
        self._reservations = reservations
        self._segments = segments

    def segments(self, volume: Volume) -> Segments:
        """Return the place of these pools, whatever the volume."""
        del volume
        return self._segments

    async def problem(self, volume: Volume) -> str:
        """Look at the volume's image."""
        return await self._pools.holding(volume.pool).problem(volume)

    async def room(self, asked: GetCapacity) -> list[int]:
        """Look at the pool that is asked for, else the default one, else all of them."""
        name = asked.asked.pool or self._pools.default_name()
        backends = [self._pools.named(name)] if name else list(self._pools)
        bus = asked.asked.bus or Bus.VIRTIO
        fitting = [
            backend
            for backend in backends
            if (is_shared(backend.kind) or includes(asked.place, self._segments))
            and not any(objection(use, backend=backend.kind, bus=bus) for use in asked.uses)
        ]
        return [await self._reservations.available(backend) for backend in fitting]
