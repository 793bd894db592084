"""What the services ask of a pool, whatever its backend: the seam that file, nbd, qsd and rbd pools implement.

Promises of every implementation: an image appears whole under its final name or not at all; every call may be
repeated after a crash and then continues or finds its work done; nothing blocks the event loop.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.volumes.model import Snapshot, Volume

# The agent allows no longer hold (MAX_HOLD_S in agent/agent.py) than this and the way of a message: applications would
# take it for a hang.
MAX_HOLD_S = 295.0


@dataclass(frozen=True)
class PoolUsage:
    """How large a pool is and what stands in it besides the volumes' promised capacity.

    Args:
        total_bytes: what the storage can hold for us at most.
        foreign_bytes: taken by others.
        snapshot_bytes: allocated by finished snapshots; they never grow.
    """

    total_bytes: int
    foreign_bytes: int
    snapshot_bytes: int


@dataclass
class Copying:
    """One copy under way, shared by who wants it and who makes it, perhaps in another thread.

    Args:
        until_s: time.monotonic() after which the copy is worthless and is given up.
        is_unwanted: it is to end as soon as it can, and to leave nothing.
        copied_bytes: of total_bytes, about; both 0 while nothing is known.
        total_bytes: that are to be moved.
    """

    until_s: float
    is_unwanted: bool = False
    copied_bytes: int = 0
    total_bytes: int = 0


class Backend(Protocol):
    """One pool. Any method may raise FailedPrecondition (pool not usable), ResourceExhausted, Unavailable."""

    @property
    def name(self) -> str:
        """The pool's name."""
        ...

    @property
    def kind(self) -> str:
        """The backend's name, such as "file"."""
        ...

    @property
    def needs_hold(self) -> bool:
        """Whether an attached volume must be held still by its worker while it is copied."""
        ...

    @property
    def keeps_copies(self) -> bool:
        """Whether a copy goes on, and is kept, when whoever asked for it ends: asking again joins it or finds it made."""
        ...

    @property
    def max_hold_s(self) -> float:
        """For how long at most it may be held still for that; its I/O waits as long."""
        ...

    async def shares_blocks(self) -> bool:
        """Tell whether copies share blocks with their source, so that one takes no time whatever its size."""
        ...

    async def check(self) -> None:
        """Prove that the pool is there and is the one we used before."""
        ...

    async def usage(self) -> PoolUsage:
        """Measure the pool."""
        ...

    async def create(self, volume: Volume) -> None:
        """Make an image that reads as zeros; fine if it is there."""
        ...

    async def clone(self, source: Volume, volume: Volume, *, copying: Copying) -> int:
        """Make an image with the source's content; it must not be written meanwhile if the pool needs_hold.

        Returns the moment of the content in nanoseconds since 1970; 0: any moment of the copy.

        Args:
            source: the volume to copy.
            volume: the new one, at least as large.
            copying: what is told of it, and by when it has to be made.

        Raises:
            DeadlineExceeded: its time came first; nothing is left.
            DataLoss: the source is missing or shorter than it should be.
        """
        ...

    async def snapshot(self, source: Volume, snapshot: Snapshot, *, copying: Copying) -> int:
        """Keep a copy of the source under the snapshot's id; as `clone`."""
        ...

    async def restore(self, snapshot: Snapshot, volume: Volume, *, copying: Copying) -> int:
        """Make an image with the snapshot's content; as `clone`."""
        ...

    async def expand(self, volume: Volume, capacity_bytes: int) -> None:
        """Grow the image; fine if it is that large already. Never shrinks."""
        ...

    async def delete_volume(self, volume_id: str) -> None:
        """Remove the image; fine if it is gone."""
        ...

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Remove the snapshot's image; fine if it is gone."""
        ...

    async def has_volume(self, volume_id: str) -> bool:
        """Tell whether there is an image of this id."""
        ...

    async def problem(self, volume: Volume) -> str:
        """Say what is wrong with the volume's image, or nothing if it is as recorded."""
        ...

    async def allocated_bytes(self, of: Volume | Snapshot) -> int:
        """Measure what a full copy would have to move, in bytes; 0 if there is no image."""
        ...

    async def clean(self) -> None:
        """Remove what interrupted calls left unfinished."""
        ...

    def close(self) -> None:
        """Stop threads and connections; the pool is not used afterwards."""
        ...

    async def publish(self, volume: Volume, node_id: str, *, read_only: bool, shared: bool) -> dict[str, str]:
        """Let a node use a volume; return what the node must know. The same again gives the same.

        Args:
            volume: what.
            node_id: to whom.
            read_only: the node must not write.
            shared: another node may write it too.

        Raises:
            AlreadyExists: the node has it otherwise.
            FailedPrecondition: another node's use excludes this one.
        """
        ...

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Take a volume back; the node can never write it again. Fine if it is not published there.

        node_id: empty for all nodes.
        """
        ...

    async def published(self) -> Mapping[str, tuple[str, ...]]:
        """Return the ids of published volumes and of their nodes."""
        ...

    async def nodes_of(self, volume_id: str) -> tuple[str, ...]:
        """Return the nodes that a volume is published to."""
        ...

    async def data_path(self, volume: Volume, publish_context: Mapping[str, str]) -> BackendSpec:
        """Return what the agent needs to serve the volume, after `publish` returned publish_context."""
        ...
