"""Volumes, snapshots and pools for the tests of backends and services."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

from csi_vduse.backends.base import Copying
from csi_vduse.backends.file import FilePool
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.model import Snapshot, State, Volume, VolumeParameters

MIB = 1 << 20


def a_volume(name: str = "v", **changes: object) -> Volume:
    volume = Volume(
        id=volume_id(name),
        name=name,
        pool="default",
        backend="file",
        capacity_bytes=4 * MIB,
        parameters=VolumeParameters(),
        source=None,
        filesystem=None,
        state=State.CREATING,
        created_at_ns=1,
    )
    return replace(volume, **changes)  # type: ignore[arg-type]


def a_snapshot(name: str = "s", source: str = "v", **changes: object) -> Snapshot:
    snapshot = Snapshot(
        snapshot_id(name), name, volume_id(source), "default", 4 * MIB, 1, State.CREATING, None
    )
    return replace(snapshot, **changes)  # type: ignore[arg-type]


def a_pool(directory: Path) -> FilePool:
    """A pool in `directory`/pool, which is made, remembered in `directory`/memory.json."""
    (directory / "pool").mkdir(exist_ok=True)
    return FilePool("default", directory / "pool", memory=directory / "memory.json")


def image_of(directory: Path, volume: Volume | Snapshot) -> Path:
    part = "volumes" if isinstance(volume, Volume) else "snapshots"
    return directory / "pool" / part / volume.id / "image.raw"


def soon() -> Copying:
    return Copying(time.monotonic() + 60.0)


def files_below(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file())
