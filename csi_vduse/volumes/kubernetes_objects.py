"""Volumes and snapshots as objects of the Kubernetes API, both ways. Pure.

`spec` is what is wanted and is written by the controller; `status` is what is so and is written where the
bytes are: by the node of a file pool. An object whose status has no state was not begun by its node: it
reserves nothing and has no image, and as a Volume it does not exist yet. `Failed` and `Deleted` are the same
to a registry: no image, no promise. The names of the states are those of the model, in the API's spelling.
"""

from __future__ import annotations

import datetime as dt

from csi_vduse.dataplane.throttle import DEFAULT_BURST_S, Throttle
from csi_vduse.errors import DataLoss, InvalidArgument, VduseError
from csi_vduse.kube.resources import API_VERSION, FINALIZER, SNAPSHOTS, VOLUMES, Object, is_going
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.model import (
    Snapshot,
    Source,
    SourceKind,
    State,
    Volume,
    VolumeParameters,
    filesystem_from_json,
    filesystem_to_json,
)

FAILED = "Failed"
DELETED = "Deleted"
_STATES = {State.CREATING: "Creating", State.READY: "Ready", State.DELETING: "Deleting"}
_BY_NAME = {name: state for state, name in _STATES.items()}
_PROGRESS = frozenset({"copiedBytes", "totalBytes", "copied"})
_UNITS = ("", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei")


def volume_spec(volume: Volume) -> Object:
    """Return the spec that asks for a volume."""
    parameters = volume.parameters
    spec: Object = {
        "volumeName": volume.name,
        "pool": volume.pool,
        "backend": volume.backend,
        "nodeName": volume.node,
        "capacityBytes": volume.capacity_bytes,
        "parameters": {
            "bus": parameters.bus.value,
            "queues": parameters.queues,
            "queueSize": parameters.queue_size,
            "blockSizeBytes": parameters.block_size_bytes,
        },
        "throttle": throttle_spec(volume.throttle),
    }
    if volume.source is not None:
        spec["source"] = {"kind": volume.source.kind.value, "id": volume.source.id}
    return spec


def throttle_spec(throttle: Throttle) -> Object:
    """Return the part of a spec that says how fast a volume may be."""
    return {
        "iops": throttle.iops,
        "bytesPerSecond": throttle.bytes_per_s,
        "burstSeconds": throttle.burst_s,
    }


def throttle_of(found: Object) -> Throttle:
    """Return how fast a volume may be, as its spec says."""
    asked = found["spec"].get("throttle", {})
    return Throttle(
        int(asked.get("iops", 0)),
        int(asked.get("bytesPerSecond", 0)),
        float(asked.get("burstSeconds", DEFAULT_BURST_S)),
    )


def volume_object(volume: Volume) -> Object:
    """Return a new object that asks for a volume."""
    return {
        "apiVersion": API_VERSION,
        "kind": VOLUMES.kind,
        "metadata": {"name": volume.id, "finalizers": [FINALIZER]},
        "spec": volume_spec(volume),
    }


def volume_status(volume: Volume, before: Object) -> Object:
    """Return the status that records a volume; what it does not record stays as before."""
    return {
        **without_progress(before),
        "state": _STATES[volume.state],
        "capacityBytes": volume.capacity_bytes,
        "capacity": quantity(volume.capacity_bytes),
        "expandingToBytes": volume.expanding_to_bytes,
        "filesystem": filesystem_to_json(volume.filesystem),
    }


def wanted_volume(found: Object) -> Volume:
    """Return the volume that a spec asks for, in state CREATING, whether it was begun or not.

    Raises:
        DataLoss: the object is not one of ours.
    """
    try:
        spec, asked, source = found["spec"], found["spec"]["parameters"], found["spec"].get("source")
        return Volume(
            id=found["metadata"]["name"],
            name=spec["volumeName"],
            pool=spec["pool"],
            backend=spec["backend"],
            capacity_bytes=int(spec["capacityBytes"]),
            parameters=VolumeParameters(
                bus=Bus(asked["bus"]),
                queues=int(asked["queues"]),
                queue_size=int(asked["queueSize"]),
                block_size_bytes=int(asked["blockSizeBytes"]),
            ),
            source=Source(SourceKind(source["kind"]), source["id"]) if source else None,
            filesystem=None,
            state=State.CREATING,
            created_at_ns=_created_at_ns(found),
            throttle=throttle_of(found),
            node=spec.get("nodeName", ""),
        )
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise _damaged(found, error) from error


def volume_from_object(found: Object) -> Volume | None:
    """Return the volume that an object records, or None if it was not begun or is no more.

    Raises:
        DataLoss: the object is not one of ours.
    """
    state = recorded_state(found)
    if state is None:
        return None
    wanted, status = wanted_volume(found), found["status"]
    try:
        return Volume(
            id=wanted.id,
            name=wanted.name,
            pool=wanted.pool,
            backend=wanted.backend,
            capacity_bytes=int(status["capacityBytes"]),
            parameters=wanted.parameters,
            source=wanted.source,
            filesystem=filesystem_from_json(status.get("filesystem")),
            state=State.DELETING if is_going(found) else state,
            created_at_ns=wanted.created_at_ns,
            expanding_to_bytes=int(status.get("expandingToBytes", 0)),
            throttle=wanted.throttle,
            node=wanted.node,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(found, error) from error


def snapshot_object(snapshot: Snapshot) -> Object:
    """Return a new object that asks for a snapshot."""
    return {
        "apiVersion": API_VERSION,
        "kind": SNAPSHOTS.kind,
        "metadata": {"name": snapshot.id, "finalizers": [FINALIZER]},
        "spec": {
            "snapshotName": snapshot.name,
            "sourceVolumeId": snapshot.source_volume_id,
            "pool": snapshot.pool,
            "nodeName": snapshot.node,
        },
    }


def snapshot_status(snapshot: Snapshot, before: Object) -> Object:
    """Return the status that records a snapshot."""
    return {
        **without_progress(before),
        "state": _STATES[snapshot.state],
        "sizeBytes": snapshot.size_bytes,
        "size": quantity(snapshot.size_bytes),
        "cutAtNanoseconds": snapshot.created_at_ns,
        "filesystem": filesystem_to_json(snapshot.filesystem),
        "blockSizeBytes": snapshot.block_size_bytes,
    }


def snapshot_from_object(found: Object) -> Snapshot | None:
    """Return the snapshot that an object records, or None if it was not begun or is no more.

    Raises:
        DataLoss: the object is not one of ours.
    """
    state = recorded_state(found)
    if state is None:
        return None
    try:
        spec, status = found["spec"], found["status"]
        return Snapshot(
            id=found["metadata"]["name"],
            name=spec["snapshotName"],
            source_volume_id=spec["sourceVolumeId"],
            pool=spec["pool"],
            size_bytes=int(status["sizeBytes"]),
            created_at_ns=int(status["cutAtNanoseconds"]),
            state=State.DELETING if is_going(found) else state,
            filesystem=filesystem_from_json(status.get("filesystem")),
            block_size_bytes=int(status["blockSizeBytes"]),
            node=spec.get("nodeName", ""),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(found, error) from error


def recorded_state(found: Object) -> State | None:
    """Return the state that its node gave an object, or None if there is nothing behind it."""
    return _BY_NAME.get(found.get("status", {}).get("state", ""))


def has_state(found: Object, *names: str) -> bool:
    """Tell whether the status says one of these, such as DELETED."""
    return found.get("status", {}).get("state", "") in names


def with_progress(found: Object, copied_bytes: int, total_bytes: int) -> Object | None:
    """Return a status that says how far the copy is that fills an object, or None if it is not being made any more.

    total_bytes is not 0.
    """
    if recorded_state(found) is not State.CREATING:
        return None
    share = f"{min(100, 100 * copied_bytes // total_bytes)}%"
    return {**found["status"], "copiedBytes": copied_bytes, "totalBytes": total_bytes, "copied": share}


def without_progress(status: Object) -> Object:
    """Return a status that says nothing of a copy: it is made, or given up."""
    return {key: value for key, value in status.items() if key not in _PROGRESS}


def error_status(error: VduseError, generation: int, *, retrying: bool = False) -> Object:
    """Return an error as a part of a status.

    Args:
        error: what went wrong.
        generation: of the object whose spec was being met.
        retrying: its node goes on trying: told to people, not answered to callers.
    """
    return {
        "retrying": retrying,
        "code": error.grpc_code,
        "message": error.message,
        "hint": error.hint,
        "generation": generation,
    }


def error_from_status(found: Object) -> VduseError | None:
    """Return what its node says cannot be done about the spec as it is now, or None."""
    said = found.get("status", {}).get("error")
    if not said or said.get("retrying") or said.get("generation") != found["metadata"].get("generation"):
        return None
    kinds = {
        kind.grpc_code: kind
        for kind in reversed(VduseError.__subclasses__())
        if kind.__init__ is VduseError.__init__
    }
    return kinds.get(said.get("code", ""), VduseError)(said.get("message", ""), hint=said.get("hint", ""))


def quantity(size_bytes: int) -> str:
    """Return a size as people write it, such as 10Gi; exact, so that it may be in smaller units."""
    power = 0
    while size_bytes and size_bytes % 1024 == 0 and power < len(_UNITS) - 1:
        size_bytes, power = size_bytes // 1024, power + 1
    return f"{size_bytes}{_UNITS[power]}"


def rough_quantity(size_bytes: int) -> str:
    """Return a size for people only, such as 19Gi: rounded down to a whole number below 10000."""
    power = 0
    while size_bytes >= 10_000 and power < len(_UNITS) - 1:
        size_bytes, power = size_bytes // 1024, power + 1
    return f"{size_bytes}{_UNITS[power]}"


def _created_at_ns(found: Object) -> int:
    text = found["metadata"].get("creationTimestamp")
    if not text:
        return 0
    return int(dt.datetime.fromisoformat(text).timestamp()) * 10**9


def _damaged(found: Object, error: Exception) -> DataLoss:
    return DataLoss(
        f"{found.get('kind', 'object')} {found['metadata'].get('name')!r} is not one that we wrote: {error!r}",
        hint="restore it from a backup of the Kubernetes API",
    )
