"""What the controller asks for, whoever does it.

That is the pools' own process (provisioning.py, snapshotting.py), or the node that has them, through the
Kubernetes API (remote.py). The classes there say what each may raise.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from csi_vduse.services.validation import CreateSnapshot, CreateVolume, ExpandVolume
from csi_vduse.volumes.model import Snapshot, Volume
from csi_vduse.volumes.policy import Use


class Provisioning(Protocol):
    """Volumes."""

    async def ready_volume(self, volume_id: str) -> Volume:
        """Return a volume that was answered to a caller and is not going away; NotFound if there is none."""
        ...

    async def create(self, request: CreateVolume) -> Volume:
        """Make a volume, or return the one that an equal request made."""
        ...

    async def delete(self, volume_id: str) -> None:
        """Remove a volume; fine if there is none."""
        ...

    async def expand(self, request: ExpandVolume) -> Volume:
        """Grow a volume; fine if it is large enough."""
        ...

    async def modify(self, volume_id: str, parameters: Mapping[str, str]) -> None:
        """Change a volume's mutable parameters; those that are not named stay."""
        ...

    def mismatch(self, volume: Volume, uses: tuple[Use, ...]) -> str:
        """Say why a volume cannot be used so, or nothing if it can."""
        ...


class Snapshotting(Protocol):
    """Snapshots."""

    async def create(self, request: CreateSnapshot) -> Snapshot:
        """Cut a snapshot, or return the one that an equal request made."""
        ...

    async def delete(self, snapshot_id: str) -> None:
        """Remove a snapshot; fine if there is none."""
        ...
