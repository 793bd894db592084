"""CSI Controller: every method validates, calls one operation, and answers. Locks and errors are around it.

Where things happen: provisioning.py (volumes), snapshotting.py (snapshots), publishing.py (who may use them).
Publish and unpublish are offered where a pool is not a node's own.
"""
# ruff: noqa: N802, ARG002, ANN401 - names and signatures are gRPC's

from __future__ import annotations

from typing import Any

from csi_vduse.errors import NotFound, Unimplemented
from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from csi_vduse.proto.compat import controller_volume_condition_capability, with_volume_condition
from csi_vduse.services import validation
from csi_vduse.services.messages import snapshot_message, volume_message
from csi_vduse.services.operations import Provisioning, Snapshotting
from csi_vduse.services.paging import page
from csi_vduse.services.places import Places
from csi_vduse.services.publishing import Publishing
from csi_vduse.volumes import sizes
from csi_vduse.volumes.context import volume_context
from csi_vduse.volumes.model import State
from csi_vduse.volumes.registry import Registry

_Rpc = csi_pb2.ControllerServiceCapability.RPC
CAPABILITIES = (
    _Rpc.CREATE_DELETE_VOLUME,
    _Rpc.LIST_VOLUMES,
    _Rpc.GET_CAPACITY,
    _Rpc.CREATE_DELETE_SNAPSHOT,
    _Rpc.LIST_SNAPSHOTS,
    _Rpc.CLONE_VOLUME,
    _Rpc.EXPAND_VOLUME,
    _Rpc.GET_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
    _Rpc.GET_SNAPSHOT,
    _Rpc.MODIFY_VOLUME,
)
PUBLISHING = (
    _Rpc.PUBLISH_UNPUBLISH_VOLUME,
    _Rpc.PUBLISH_READONLY,
    _Rpc.LIST_VOLUMES_PUBLISHED_NODES,
)
_HEALTHY = "the image is present and complete"


class Controller(csi_pb2_grpc.ControllerServicer):
    """The service.

    Args:
        registry: what there is.
        provisioner: acts on volumes.
        snapshotter: acts on snapshots.
        publisher: says who may use volumes.
        places: where volumes are, and what room is left.
    """

    def __init__(
        self,
        *,
        registry: Registry,
        provisioner: Provisioning,
        snapshotter: Snapshotting,
        publisher: Publishing,
        places: Places,
    ) -> None:
        self._registry = registry
        self._provisioner = provisioner
        self._snapshotter = snapshotter
        self._publisher = publisher
        self._places = places

    async def ControllerGetCapabilities(
        self, request: csi_pb2.ControllerGetCapabilitiesRequest, context: Any
    ) -> csi_pb2.ControllerGetCapabilitiesResponse:
        """Return what is offered, with the volume condition that 1.12 callers look for."""
        offered = (*CAPABILITIES, *(PUBLISHING if self._publisher.offered else ()))
        capabilities = [csi_pb2.ControllerServiceCapability(rpc=_Rpc(type=kind)) for kind in offered]
        return csi_pb2.ControllerGetCapabilitiesResponse(
            capabilities=[*capabilities, controller_volume_condition_capability()]
        )

    async def CreateVolume(
        self, request: csi_pb2.CreateVolumeRequest, context: Any
    ) -> csi_pb2.CreateVolumeResponse:
        """Make a volume: blank, from a snapshot, or from another volume."""
        volume = await self._provisioner.create(validation.create_volume(request))
        return csi_pb2.CreateVolumeResponse(volume=volume_message(volume, self._places.segments(volume)))

    async def DeleteVolume(
        self, request: csi_pb2.DeleteVolumeRequest, context: Any
    ) -> csi_pb2.DeleteVolumeResponse:
        """Remove a volume that is not attached."""
        await self._provisioner.delete(validation.object_id(request.volume_id, "volume_id"))
        return csi_pb2.DeleteVolumeResponse()

    async def ControllerExpandVolume(
        self, request: csi_pb2.ControllerExpandVolumeRequest, context: Any
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        """Grow a volume; the node always follows, since the worker must tell the driver the new size."""
        volume = await self._provisioner.expand(validation.expand_volume(request))
        return csi_pb2.ControllerExpandVolumeResponse(
            capacity_bytes=volume.capacity_bytes, node_expansion_required=True
        )

    async def ValidateVolumeCapabilities(
        self, request: csi_pb2.ValidateVolumeCapabilitiesRequest, context: Any
    ) -> csi_pb2.ValidateVolumeCapabilitiesResponse:
        """Tell whether a volume can be used so."""
        asked = validation.validate_capabilities(request)
        volume = await self._provisioner.ready_volume(asked.volume_id)
        reason = self._provisioner.mismatch(volume, asked.uses)
        if not reason and asked.context and asked.context != volume_context(volume):
            reason = "volume_context is not that of this volume"
        if not reason and asked.asked is not None:
            reason = asked.asked.difference(
                volume.pool, volume.parameters, inherits=volume.source is not None
            )
        if reason:
            return csi_pb2.ValidateVolumeCapabilitiesResponse(message=reason)
        return csi_pb2.ValidateVolumeCapabilitiesResponse(
            confirmed=csi_pb2.ValidateVolumeCapabilitiesResponse.Confirmed(
                volume_context=request.volume_context,
                volume_capabilities=request.volume_capabilities,
                parameters=request.parameters,
            )
        )

    async def ListVolumes(
        self, request: csi_pb2.ListVolumesRequest, context: Any
    ) -> csi_pb2.ListVolumesResponse:
        """Return a page of the volumes, oldest first."""
        volumes = [one for one in await self._registry.list_volumes() if one.state is State.READY]
        shown, next_token = page(
            volumes,
            max_entries=validation.max_entries(request.max_entries),
            starting_token=request.starting_token,
        )
        published = await self._publisher.published()
        entries = []
        for volume in shown:
            status = csi_pb2.ListVolumesResponse.VolumeStatus(published_node_ids=published.get(volume.id, ()))
            problem = await self._places.problem(volume)
            with_volume_condition(status, abnormal=bool(problem), message=problem or _HEALTHY)
            entries.append(
                csi_pb2.ListVolumesResponse.Entry(
                    volume=volume_message(volume, self._places.segments(volume)), status=status
                )
            )
        return csi_pb2.ListVolumesResponse(entries=entries, next_token=next_token)

    async def ControllerGetVolume(
        self, request: csi_pb2.ControllerGetVolumeRequest, context: Any
    ) -> csi_pb2.ControllerGetVolumeResponse:
        """Return one volume and whether its image is whole."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        volume = await self._provisioner.ready_volume(volume_id)
        status = csi_pb2.ControllerGetVolumeResponse.VolumeStatus(
            published_node_ids=await self._publisher.nodes_of(volume)
        )
        problem = await self._places.problem(volume)
        with_volume_condition(status, abnormal=bool(problem), message=problem or _HEALTHY)
        return csi_pb2.ControllerGetVolumeResponse(
            volume=volume_message(volume, self._places.segments(volume)), status=status
        )

    async def GetCapacity(
        self, request: csi_pb2.GetCapacityRequest, context: Any
    ) -> csi_pb2.GetCapacityResponse:
        """Return what may still be promised in the pool that such volumes would go to.

        Without a pool to go by it is the sum of all pools, and the largest volume is that of the emptiest.
        """
        asked = validation.get_capacity(request)
        left = await self._places.room(asked)
        response = csi_pb2.GetCapacityResponse(available_capacity=sum(left))
        response.maximum_volume_size.value = max(left, default=0)
        response.minimum_volume_size.value = sizes.floor_bytes(use.filesystem for use in asked.uses)
        return response

    async def CreateSnapshot(
        self, request: csi_pb2.CreateSnapshotRequest, context: Any
    ) -> csi_pb2.CreateSnapshotResponse:
        """Cut a snapshot; it is ready to use when this returns."""
        snapshot = await self._snapshotter.create(validation.create_snapshot(request))
        return csi_pb2.CreateSnapshotResponse(snapshot=snapshot_message(snapshot))

    async def DeleteSnapshot(
        self, request: csi_pb2.DeleteSnapshotRequest, context: Any
    ) -> csi_pb2.DeleteSnapshotResponse:
        """Remove a snapshot."""
        await self._snapshotter.delete(validation.object_id(request.snapshot_id, "snapshot_id"))
        return csi_pb2.DeleteSnapshotResponse()

    async def ListSnapshots(
        self, request: csi_pb2.ListSnapshotsRequest, context: Any
    ) -> csi_pb2.ListSnapshotsResponse:
        """Return a page of the finished snapshots, oldest first; filters that match nothing give nothing."""
        snapshots = [
            one
            for one in await self._registry.list_snapshots()
            if one.state is State.READY
            and request.snapshot_id in {"", one.id}
            and request.source_volume_id in {"", one.source_volume_id}
        ]
        shown, next_token = page(
            snapshots,
            max_entries=validation.max_entries(request.max_entries),
            starting_token=request.starting_token,
        )
        return csi_pb2.ListSnapshotsResponse(
            entries=[csi_pb2.ListSnapshotsResponse.Entry(snapshot=snapshot_message(one)) for one in shown],
            next_token=next_token,
        )

    async def GetSnapshot(
        self, request: csi_pb2.GetSnapshotRequest, context: Any
    ) -> csi_pb2.GetSnapshotResponse:
        """Return one snapshot; one that is still being copied is not ready to use."""
        snapshot_id = validation.object_id(request.snapshot_id, "snapshot_id")
        snapshot = await self._registry.get_snapshot(snapshot_id)
        if snapshot is None or snapshot.state is State.DELETING:
            raise NotFound(f"snapshot {snapshot_id!r} does not exist")
        return csi_pb2.GetSnapshotResponse(snapshot=snapshot_message(snapshot))

    async def ControllerPublishVolume(
        self, request: csi_pb2.ControllerPublishVolumeRequest, context: Any
    ) -> csi_pb2.ControllerPublishVolumeResponse:
        """Let a node use a volume, and tell it where."""
        self._require_publishing("ControllerPublishVolume")
        told = await self._publisher.publish(validation.publish_volume(request))
        return csi_pb2.ControllerPublishVolumeResponse(publish_context=told)

    async def ControllerUnpublishVolume(
        self, request: csi_pb2.ControllerUnpublishVolumeRequest, context: Any
    ) -> csi_pb2.ControllerUnpublishVolumeResponse:
        """Take a volume back from a node, or from all of them."""
        self._require_publishing("ControllerUnpublishVolume")
        volume_id = validation.object_id(request.volume_id, "volume_id")
        await self._publisher.unpublish(volume_id, request.node_id)
        return csi_pb2.ControllerUnpublishVolumeResponse()

    async def ControllerModifyVolume(
        self, request: csi_pb2.ControllerModifyVolumeRequest, context: Any
    ) -> csi_pb2.ControllerModifyVolumeResponse:
        """Change how fast a volume may be, at once if it is attached."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        await self._provisioner.modify(volume_id, request.mutable_parameters)
        return csi_pb2.ControllerModifyVolumeResponse()

    async def ControllerGetVolumeHealth(
        self, request: csi_pb2.ControllerGetVolumeHealthRequest, context: Any
    ) -> csi_pb2.ControllerGetVolumeHealthResponse:
        """Refuse: not advertised; the node tells a volume's health."""
        raise Unimplemented("ControllerGetVolumeHealth is not offered by this driver")

    async def ControllerListVolumeHealth(
        self, request: csi_pb2.ControllerListVolumeHealthRequest, context: Any
    ) -> csi_pb2.ControllerListVolumeHealthResponse:
        """Refuse: not advertised, as ControllerGetVolumeHealth."""
        raise Unimplemented("ControllerListVolumeHealth is not offered by this driver")

    def _require_publishing(self, method: str) -> None:
        if not self._publisher.offered:
            raise Unimplemented(f"{method} is not offered: volumes of these pools are where they can be used")
