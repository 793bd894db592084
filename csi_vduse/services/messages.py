"""Volumes and snapshots as CSI messages: the way out, as validation.py is the way in. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from google.protobuf.timestamp_pb2 import Timestamp

from csi_vduse.proto import csi_pb2
from csi_vduse.volumes.context import volume_context
from csi_vduse.volumes.model import Snapshot, Source, SourceKind, State, Volume
from csi_vduse.volumes.policy import is_shared


def volume_message(volume: Volume, segments: Mapping[str, str]) -> csi_pb2.Volume:
    """Return the message.

    Args:
        volume: what to tell.
        segments: the one place that it can be used from, unless it can be used from anywhere.
    """
    return csi_pb2.Volume(
        volume_id=volume.id,
        capacity_bytes=volume.capacity_bytes,
        volume_context=volume_context(volume),
        content_source=_source_message(volume.source) if volume.source else None,
        accessible_topology=[] if is_shared(volume.backend) else [csi_pb2.Topology(segments=dict(segments))],
    )


def snapshot_message(snapshot: Snapshot) -> csi_pb2.Snapshot:
    """Return the message; an unfinished snapshot is not ready to use."""
    created = Timestamp()
    created.FromNanoseconds(snapshot.created_at_ns)
    return csi_pb2.Snapshot(
        snapshot_id=snapshot.id,
        source_volume_id=snapshot.source_volume_id,
        size_bytes=snapshot.size_bytes,
        creation_time=created,
        ready_to_use=snapshot.state is State.READY,
    )


def _source_message(source: Source) -> csi_pb2.VolumeContentSource:
    if source.kind is SourceKind.SNAPSHOT:
        return csi_pb2.VolumeContentSource(
            snapshot=csi_pb2.VolumeContentSource.SnapshotSource(snapshot_id=source.id)
        )
    return csi_pb2.VolumeContentSource(volume=csi_pb2.VolumeContentSource.VolumeSource(volume_id=source.id))
