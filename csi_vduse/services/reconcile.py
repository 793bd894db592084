"""At start: go on with what the last process left half done, as far as nobody else will.

Compared are the records and the pools; the plan is a list of steps that can be printed. Unfinished creates
stay as they are: their callers try again, and the next try starts over (provisioning.py). A pool that is not
there now is left alone, and so are its volumes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from csi_vduse import log
from csi_vduse.backends.pools import Pools
from csi_vduse.errors import VduseError
from csi_vduse.services.provisioning import Provisioner
from csi_vduse.services.snapshotting import Snapshotter
from csi_vduse.volumes.model import Snapshot, State, Volume
from csi_vduse.volumes.registry import Registry


@dataclass(frozen=True)
class FinishVolumeDelete:
    """A volume whose delete was interrupted."""

    volume: Volume


@dataclass(frozen=True)
class FinishSnapshotDelete:
    """A snapshot whose delete was interrupted."""

    snapshot: Snapshot


@dataclass(frozen=True)
class ForgetExpansion:
    """A volume whose expansion was interrupted; the caller will ask again. Frees the promised room."""

    volume: Volume


Step = FinishVolumeDelete | FinishSnapshotDelete | ForgetExpansion


def plan(volumes: Iterable[Volume], snapshots: Iterable[Snapshot]) -> list[Step]:
    """Decide what to do about the records found at start. Pure."""
    steps: list[Step] = []
    for volume in volumes:
        if volume.state is State.DELETING:
            steps.append(FinishVolumeDelete(volume))
        elif volume.expanding_to_bytes:
            steps.append(ForgetExpansion(volume))
    steps.extend(FinishSnapshotDelete(one) for one in snapshots if one.state is State.DELETING)
    return steps


async def reconcile(
    *, registry: Registry, pools: Pools, provisioner: Provisioner, snapshotter: Snapshotter
) -> None:
    """Carry out the plan and remove unfinished images. A step that fails is logged and left for later."""
    for backend in pools:
        try:
            await backend.clean()
        except VduseError as error:
            log.get().error("pool is not usable now", pool=backend.name, error=str(error))
    for step in plan(await registry.list_volumes(), await registry.list_snapshots()):
        log.get().info("finishing what an earlier process left", step=type(step).__name__)
        try:
            match step:
                case FinishVolumeDelete(volume):
                    await provisioner.finish_delete(volume)
                case FinishSnapshotDelete(snapshot):
                    await snapshotter.delete(snapshot.id)
                case ForgetExpansion(volume):
                    await registry.update_volume(volume.id, lambda one: replace(one, expanding_to_bytes=0))
        except VduseError as error:
            log.get().warning("left for the next try", step=repr(step), error=str(error))
