"""What a volume and a snapshot are, as values, and their JSON form.

Nothing here acts. A record is written before the act that it describes: `creating` before there is an image,
`deleting` before the image goes. Only `ready` objects have ever been answered to a caller, so a `creating`
one may be continued or discarded freely.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from csi_vduse.dataplane import throttle as throttle_json
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.errors import DataLoss, InvalidArgument
from csi_vduse.vdpa.model import Bus


class State(Enum):
    """Where a volume or snapshot is in its life."""

    CREATING = "creating"
    READY = "ready"
    DELETING = "deleting"


class FilesystemState(Enum):
    """How far the file system of a volume has come."""

    FORMATTING = "formatting"
    FORMATTED = "formatted"


@dataclass(frozen=True)
class FilesystemRecord:
    """What the volume's own metadata says about its file system.

    Written as `formatting` before the first byte of a mkfs and as `formatted` after its last one. A volume
    without this record has never been formatted by us.

    Args:
        type: such as "ext4".
        state: see FilesystemState.
        uuid: that the file system being made is to have; empty once it is made, and in records of releases that
            chose none.
    """

    type: str
    state: FilesystemState
    uuid: str = ""


def record_of_copy(source: FilesystemRecord | None) -> FilesystemRecord | None:
    """Return what may be said of a copy, from its source's record as it was read before the copy was cut.

    Only `formatted` stays true whatever happens until the cut. A file system that is being made may be finished and
    hold data by then; the copy's content decides.
    """
    return source if source is not None and source.state is FilesystemState.FORMATTED else None


class SourceKind(Enum):
    """What a volume was filled from."""

    SNAPSHOT = "snapshot"
    VOLUME = "volume"


@dataclass(frozen=True)
class Source:
    """The snapshot or volume that a volume was filled from."""

    kind: SourceKind
    id: str


@dataclass(frozen=True)
class VolumeParameters:
    """What a StorageClass decides about a volume's device.

    Args:
        bus: which bus driver gets the device.
        queues: number of virtqueues; 0 leaves it to the node that attaches.
        queue_size: entries of a virtqueue, a power of two.
        block_size_bytes: logical block size that the driver sees.
    """

    bus: Bus = Bus.VIRTIO
    queues: int = 0
    queue_size: int = 256
    block_size_bytes: int = 512


@dataclass(frozen=True)
class Volume:
    """One volume as the registry knows it.

    Args:
        id: see volumes/ids.py; derived from the name.
        name: as the caller of CreateVolume chose it.
        pool: name of the pool it lives in.
        backend: kind of that pool.
        capacity_bytes: a multiple of the block size.
        parameters: settings of its device.
        source: what it was filled from, if anything.
        filesystem: see FilesystemRecord; None if never formatted.
        state: see State.
        created_at_ns: nanoseconds since 1970, UTC; also the order of listings.
        expanding_to_bytes: written before the image grows, cleared after; 0 when no expansion is under way.
        throttle: how fast it may be; changes at any time.
        node: the node that its pool is on; empty: the one that the registry belongs to, or any.
    """

    id: str
    name: str
    pool: str
    backend: str
    capacity_bytes: int
    parameters: VolumeParameters
    source: Source | None
    filesystem: FilesystemRecord | None
    state: State
    created_at_ns: int
    expanding_to_bytes: int = 0
    throttle: Throttle = UNLIMITED
    node: str = ""

    @property
    def reserved_bytes(self) -> int:
        """What the volume may come to occupy in its pool."""
        return max(self.capacity_bytes, self.expanding_to_bytes)


@dataclass(frozen=True)
class Snapshot:
    """One snapshot as the registry knows it.

    Args:
        id: see volumes/ids.py; derived from the name.
        name: as the caller of CreateSnapshot chose it.
        source_volume_id: the volume it was cut from, which may be gone by now.
        pool: name of the pool it lives in.
        size_bytes: capacity of the volume when it was cut.
        created_at_ns: when the data was cut, nanoseconds since 1970, UTC.
        state: see State; usable only when ready.
        filesystem: what its content is known to be, see record_of_copy.
        block_size_bytes: the volume's block size.
        node: the node that its pool is on; as Volume.node.
    """

    id: str
    name: str
    source_volume_id: str
    pool: str
    size_bytes: int
    created_at_ns: int
    state: State
    filesystem: FilesystemRecord | None
    block_size_bytes: int = 512
    node: str = ""


def volume_to_json(volume: Volume) -> dict[str, Any]:
    """Encode for a record."""
    parameters = volume.parameters
    return {
        "id": volume.id,
        "name": volume.name,
        "pool": volume.pool,
        "backend": volume.backend,
        "capacity_bytes": volume.capacity_bytes,
        "parameters": {
            "bus": parameters.bus.value,
            "queues": parameters.queues,
            "queue_size": parameters.queue_size,
            "block_size_bytes": parameters.block_size_bytes,
        },
        "source": {"kind": volume.source.kind.value, "id": volume.source.id} if volume.source else None,
        "filesystem": filesystem_to_json(volume.filesystem),
        "state": volume.state.value,
        "created_at_ns": volume.created_at_ns,
        "expanding_to_bytes": volume.expanding_to_bytes,
        "throttle": throttle_json.to_json(volume.throttle),
    }


def volume_from_json(record: dict[str, Any]) -> Volume:
    """Decode what `volume_to_json` made.

    Raises:
        DataLoss: a field is missing or has a value that we never write.
    """
    try:
        parameters = record["parameters"]
        source = record["source"]
        return Volume(
            id=record["id"],
            name=record["name"],
            pool=record["pool"],
            backend=record["backend"],
            capacity_bytes=int(record["capacity_bytes"]),
            parameters=VolumeParameters(
                bus=Bus(parameters["bus"]),
                queues=int(parameters["queues"]),
                queue_size=int(parameters["queue_size"]),
                block_size_bytes=int(parameters["block_size_bytes"]),
            ),
            source=Source(SourceKind(source["kind"]), source["id"]) if source else None,
            filesystem=filesystem_from_json(record["filesystem"]),
            state=State(record["state"]),
            created_at_ns=int(record["created_at_ns"]),
            expanding_to_bytes=int(record["expanding_to_bytes"]),
            throttle=throttle_json.from_json(record.get("throttle")),
        )
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise _damaged("volume", record, error) from error


def snapshot_to_json(snapshot: Snapshot) -> dict[str, Any]:
    """Encode for a record."""
    return {
        "id": snapshot.id,
        "name": snapshot.name,
        "source_volume_id": snapshot.source_volume_id,
        "pool": snapshot.pool,
        "size_bytes": snapshot.size_bytes,
        "created_at_ns": snapshot.created_at_ns,
        "state": snapshot.state.value,
        "filesystem": filesystem_to_json(snapshot.filesystem),
        "block_size_bytes": snapshot.block_size_bytes,
    }


def snapshot_from_json(record: dict[str, Any]) -> Snapshot:
    """Decode what `snapshot_to_json` made.

    Raises:
        DataLoss: a field is missing or has a value that we never write.
    """
    try:
        return Snapshot(
            id=record["id"],
            name=record["name"],
            source_volume_id=record["source_volume_id"],
            pool=record["pool"],
            size_bytes=int(record["size_bytes"]),
            created_at_ns=int(record["created_at_ns"]),
            state=State(record["state"]),
            filesystem=filesystem_from_json(record["filesystem"]),
            block_size_bytes=int(record["block_size_bytes"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged("snapshot", record, error) from error


def filesystem_to_json(filesystem: FilesystemRecord | None) -> dict[str, str] | None:
    """Encode for a record or an object of the Kubernetes API; one without a UUID as releases before it did."""
    if filesystem is None:
        return None
    of_mkfs = {"uuid": filesystem.uuid} if filesystem.uuid else {}
    return {"type": filesystem.type, "state": filesystem.state.value, **of_mkfs}


def filesystem_from_json(value: dict[str, str] | None) -> FilesystemRecord | None:
    """Decode what `filesystem_to_json` made.

    Raises:
        KeyError, TypeError, ValueError: it is something else.
    """
    if not value:
        return None
    return FilesystemRecord(value["type"], FilesystemState(value["state"]), value.get("uuid", ""))


def _damaged(kind: str, record: dict[str, Any], error: Exception) -> DataLoss:
    return DataLoss(
        f"record of {kind} {record.get('id', '?')!r} is damaged: {error!r}",
        hint="restore the file from a backup of the state directory",
    )
