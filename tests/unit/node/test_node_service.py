"""The Node service's messages: capabilities, place, health, and both forms of the volume's condition."""

from __future__ import annotations

import pytest

from csi_vduse.agent.model import State
from csi_vduse.errors import InvalidArgument, Unavailable
from csi_vduse.proto import csi_compat_pb2, csi_pb2
from csi_vduse.services.node import Node
from tests.unit.node.conftest import MIB, LoopNode, use

Rpc = csi_pb2.NodeServiceCapability.RPC
Usage = csi_pb2.VolumeUsage


def old_condition(response: csi_pb2.NodeGetVolumeStatsResponse) -> csi_compat_pb2.VolumeCondition:
    """What a kubelet of CSI 1.12 reads."""
    return csi_compat_pb2.ConditionHolder.FromString(response.SerializeToString()).volume_condition


async def test_capabilities_are_those_that_work(loop_node: LoopNode) -> None:
    answer = await Node(loop_node.node).NodeGetCapabilities(csi_pb2.NodeGetCapabilitiesRequest(), None)
    assert [capability.rpc.type for capability in answer.capabilities] == [
        Rpc.STAGE_UNSTAGE_VOLUME,
        Rpc.GET_VOLUME_STATS,
        Rpc.EXPAND_VOLUME,
        Rpc.SINGLE_NODE_MULTI_WRITER,
        Rpc.GET_VOLUME_HEALTH,
        Rpc.GET_STORAGE_HEALTH,
        csi_compat_pb2.NODE_CAPABILITY_VOLUME_CONDITION,
    ]


async def test_info_has_the_node_its_place_and_the_agents_limit(loop_node: LoopNode) -> None:
    answer = await Node(loop_node.node).NodeGetInfo(csi_pb2.NodeGetInfoRequest(), None)
    assert (answer.node_id, answer.max_volumes_per_node) == ("node-1", 7)
    assert dict(answer.accessible_topology.segments) == {"topology.csi.vduse.dev/node": "node-1"}


async def test_condition_of_a_volume_is_told_in_both_forms(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    service = Node(loop_node.node)
    stats = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume.id, volume_path=path)
    health = csi_pb2.NodeGetVolumeHealthRequest(volume_id=volume.id)

    answer = await service.NodeGetVolumeStats(stats, None)
    assert [usage.unit for usage in answer.usage] == [Usage.BYTES, Usage.INODES]
    assert 0 < answer.usage[0].total < 64 * MIB
    assert not old_condition(answer).abnormal
    assert old_condition(answer).message
    assert not (await service.NodeGetVolumeHealth(health, None)).volume_health.health_statuses

    loop_node.agent.set_state(volume.id, State.WORKER_DEAD)
    assert old_condition(await service.NodeGetVolumeStats(stats, None)).abnormal
    (entry,) = (await service.NodeGetVolumeHealth(health, None)).volume_health.health_statuses
    assert (entry.status, entry.reason) == (csi_pb2.INACCESSIBLE, "WorkerDead")


async def test_trouble_of_the_agent_is_the_nodes_storage_health(loop_node: LoopNode) -> None:
    service, request = Node(loop_node.node), csi_pb2.NodeGetStorageHealthRequest()
    assert not (await service.NodeGetStorageHealth(request, None)).backend_health
    loop_node.agent.problems = ("module vduse is not loaded",)
    (entry,) = (await service.NodeGetStorageHealth(request, None)).backend_health
    assert (entry.status, entry.message) == (csi_pb2.STORAGE_DEGRADED, "module vduse is not loaded")
    loop_node.agent.fail["probe"] = Unavailable("no agent answers")
    (entry,) = (await service.NodeGetStorageHealth(request, None)).backend_health
    assert entry.status == csi_pb2.STORAGE_UNREACHABLE


@pytest.mark.parametrize(
    ("method", "request_", "named"),
    [
        ("NodeStageVolume", csi_pb2.NodeStageVolumeRequest(), "volume_id"),
        ("NodeStageVolume", csi_pb2.NodeStageVolumeRequest(volume_id="x"), "staging_target_path"),
        (
            "NodeStageVolume",
            csi_pb2.NodeStageVolumeRequest(volume_id="x", staging_target_path="/x"),
            "volume_capability",
        ),
        ("NodeUnstageVolume", csi_pb2.NodeUnstageVolumeRequest(volume_id="x"), "staging_target_path"),
        ("NodePublishVolume", csi_pb2.NodePublishVolumeRequest(volume_id="x"), "target_path"),
        ("NodeUnpublishVolume", csi_pb2.NodeUnpublishVolumeRequest(volume_id="x"), "target_path"),
        ("NodeExpandVolume", csi_pb2.NodeExpandVolumeRequest(volume_id="x"), "volume_path"),
        ("NodeGetVolumeStats", csi_pb2.NodeGetVolumeStatsRequest(volume_id="x"), "volume_path"),
        ("NodeGetVolumeHealth", csi_pb2.NodeGetVolumeHealthRequest(), "volume_id"),
    ],
)
async def test_missing_or_malformed_field_is_named(
    loop_node: LoopNode, method: str, request_: object, named: str
) -> None:
    with pytest.raises(InvalidArgument, match=named):
        await getattr(Node(loop_node.node), method)(request_, None)
