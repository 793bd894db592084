"""CSI Node: what this node does with volumes. Requests in, node operations, messages out.

The locks (one call for each volume) and the statuses are wrappers around the server, not lines here.
"""
# ruff: noqa: N802, ARG002, ANN401 - names and signatures are gRPC's

from __future__ import annotations

from typing import Any

from csi_vduse.agent.model import Probe
from csi_vduse.errors import NotFound, VduseError
from csi_vduse.node.context import NodeContext, check_path
from csi_vduse.node.expand import expand
from csi_vduse.node.health import Finding, Severity
from csi_vduse.node.publish import PublishRequest, publish
from csi_vduse.node.stage import StageRequest, stage
from csi_vduse.node.stats import Stats, volume_health, volume_stats
from csi_vduse.node.unpublish import unpublish
from csi_vduse.node.unstage import unstage
from csi_vduse.node.usage import Usage
from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from csi_vduse.proto.compat import node_volume_condition_capability, with_volume_condition
from csi_vduse.services import validation
from csi_vduse.volumes.sizes import CapacityRange
from csi_vduse.volumes.topology import node_segments

_Rpc = csi_pb2.NodeServiceCapability.RPC
_CAPABILITIES = (
    _Rpc.STAGE_UNSTAGE_VOLUME,
    _Rpc.GET_VOLUME_STATS,
    _Rpc.EXPAND_VOLUME,
    _Rpc.SINGLE_NODE_MULTI_WRITER,
    _Rpc.GET_VOLUME_HEALTH,
    _Rpc.GET_STORAGE_HEALTH,
)
_SEVERITIES = {
    Severity.DEGRADED: csi_pb2.DEGRADED,
    Severity.INACCESSIBLE: csi_pb2.INACCESSIBLE,
}
_HEALTHY = "The volume works."


class Node(csi_pb2_grpc.NodeServicer):
    """The service.

    Args:
        node: what the operations work with.
    """

    def __init__(self, node: NodeContext) -> None:
        self._node = node

    async def NodeStageVolume(
        self, request: csi_pb2.NodeStageVolumeRequest, context: Any
    ) -> csi_pb2.NodeStageVolumeResponse:
        """Attach, prove, format if it is right, mount."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        path = check_path(request.staging_target_path, "staging_target_path")
        wanted = StageRequest(
            volume_id,
            path,
            validation.use(request.volume_capability),
            {**request.volume_context, **request.publish_context},
        )
        await stage(self._node, wanted)
        return csi_pb2.NodeStageVolumeResponse()

    async def NodeUnstageVolume(
        self, request: csi_pb2.NodeUnstageVolumeRequest, context: Any
    ) -> csi_pb2.NodeUnstageVolumeResponse:
        """Unmount and detach, and see that both are done."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        path = check_path(request.staging_target_path, "staging_target_path")
        await unstage(self._node, volume_id, path)
        return csi_pb2.NodeUnstageVolumeResponse()

    async def NodePublishVolume(
        self, request: csi_pb2.NodePublishVolumeRequest, context: Any
    ) -> csi_pb2.NodePublishVolumeResponse:
        """Bind a staged volume to a workload's path."""
        wanted = PublishRequest(
            volume_id=validation.object_id(request.volume_id, "volume_id"),
            target_path=check_path(request.target_path, "target_path"),
            staging_path=check_path(request.staging_target_path, "staging_target_path"),
            use=validation.use(request.volume_capability),
            read_only=request.readonly,
        )
        await publish(self._node, wanted)
        return csi_pb2.NodePublishVolumeResponse()

    async def NodeUnpublishVolume(
        self, request: csi_pb2.NodeUnpublishVolumeRequest, context: Any
    ) -> csi_pb2.NodeUnpublishVolumeResponse:
        """Take a volume away from a workload's path."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        await unpublish(self._node, volume_id, check_path(request.target_path, "target_path"))
        return csi_pb2.NodeUnpublishVolumeResponse()

    async def NodeExpandVolume(
        self, request: csi_pb2.NodeExpandVolumeRequest, context: Any
    ) -> csi_pb2.NodeExpandVolumeResponse:
        """Let device and file system take over the new capacity."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        path = _used_path(request.volume_path)
        wanted = (
            validation.capacity_range(request.capacity_range)
            if request.HasField("capacity_range")
            else CapacityRange()
        )
        return csi_pb2.NodeExpandVolumeResponse(
            capacity_bytes=await expand(self._node, volume_id, path, wanted)
        )

    async def NodeGetVolumeStats(
        self, request: csi_pb2.NodeGetVolumeStatsRequest, context: Any
    ) -> csi_pb2.NodeGetVolumeStatsResponse:
        """Tell how full a volume is, and to callers of CSI 1.12 whether it works."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        path = _used_path(request.volume_path)
        stats = await volume_stats(self._node, volume_id, path)
        return with_volume_condition(
            csi_pb2.NodeGetVolumeStatsResponse(usage=_usage_messages(stats)),
            abnormal=bool(stats.findings),
            message=" ".join(finding.message for finding in stats.findings) or _HEALTHY,
        )

    async def NodeGetVolumeHealth(
        self, request: csi_pb2.NodeGetVolumeHealthRequest, context: Any
    ) -> csi_pb2.NodeGetVolumeHealthResponse:
        """Tell what is wrong with a volume on this node."""
        volume_id = validation.object_id(request.volume_id, "volume_id")
        entries = [_health_message(finding) for finding in await volume_health(self._node, volume_id)]
        return csi_pb2.NodeGetVolumeHealthResponse(
            volume_health=csi_pb2.VolumeHealth(volume_id=volume_id, health_statuses=entries)
        )

    async def NodeGetStorageHealth(
        self, request: csi_pb2.NodeGetStorageHealthRequest, context: Any
    ) -> csi_pb2.NodeGetStorageHealthResponse:
        """Tell whether this node's agent can serve volumes."""
        response = csi_pb2.NodeGetStorageHealthResponse()
        try:
            probe = await self._node.agent.probe()
        except VduseError as error:
            response.backend_health.add(
                status=csi_pb2.STORAGE_UNREACHABLE, reason="AgentUnreachable", message=str(error)
            )
            return response
        if not probe.ready:
            response.backend_health.add(
                status=csi_pb2.STORAGE_DEGRADED, reason="AgentNotReady", message=_problems(probe)
            )
        return response

    async def NodeGetCapabilities(
        self, request: csi_pb2.NodeGetCapabilitiesRequest, context: Any
    ) -> csi_pb2.NodeGetCapabilitiesResponse:
        """Return what the methods above can do, and the 1.12 volume condition.

        No VOLUME_MOUNT_GROUP: the CSIDriver object says fsGroupPolicy File, so kubelets set the group.
        """
        capabilities = [csi_pb2.NodeServiceCapability(rpc=_Rpc(type=kind)) for kind in _CAPABILITIES]
        return csi_pb2.NodeGetCapabilitiesResponse(
            capabilities=[*capabilities, node_volume_condition_capability()]
        )

    async def NodeGetInfo(
        self, request: csi_pb2.NodeGetInfoRequest, context: Any
    ) -> csi_pb2.NodeGetInfoResponse:
        """Return this node's name, its place, and how many volumes its agent takes."""
        probe = await self._node.agent.probe()
        return csi_pb2.NodeGetInfoResponse(
            node_id=self._node.node_id,
            max_volumes_per_node=probe.max_volumes,
            accessible_topology=csi_pb2.Topology(segments=node_segments(self._node.node_id)),
        )


def _used_path(path: str) -> str:
    """Return where a volume is said to be in use; nothing is at a relative path, so that is NOT_FOUND."""
    if path and not path.startswith("/"):
        raise NotFound(f"no volume is at volume_path {path!r}", hint="give an absolute path")
    return check_path(path, "volume_path")


def _problems(probe: Probe) -> str:
    return "; ".join(probe.problems) or "The agent is not ready."


def _usage_messages(stats: Stats) -> list[csi_pb2.VolumeUsage]:
    if stats.block_bytes is not None:
        return [csi_pb2.VolumeUsage(unit=csi_pb2.VolumeUsage.BYTES, total=stats.block_bytes)]
    return _file_system_messages(stats.usage) if stats.usage else []


def _file_system_messages(usage: Usage) -> list[csi_pb2.VolumeUsage]:
    messages = [
        csi_pb2.VolumeUsage(
            unit=csi_pb2.VolumeUsage.BYTES,
            total=usage.total_bytes,
            available=usage.available_bytes,
            used=usage.used_bytes,
        )
    ]
    if usage.total_inodes is not None and usage.free_inodes is not None:
        messages.append(
            csi_pb2.VolumeUsage(
                unit=csi_pb2.VolumeUsage.INODES,
                total=usage.total_inodes,
                available=usage.free_inodes,
                used=usage.total_inodes - usage.free_inodes,
            )
        )
    return messages


def _health_message(finding: Finding) -> csi_pb2.VolumeHealth.VolumeHealthEntry:
    return csi_pb2.VolumeHealth.VolumeHealthEntry(
        status=_SEVERITIES[finding.severity], reason=finding.reason, message=finding.message
    )
