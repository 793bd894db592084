"""Pools that are on no node: the leading controller works on them, with a real storage server and daemon."""

import grpc

from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from tests.unit.cluster.conftest import TIMEOUT_S, until
from tests.unit.cluster.test_volumes_in_a_cluster import create_when_known, expand, failure
from tests.unit.services.stack import MIB, Mode, block


async def publish(cluster, id_, node):
    request = csi_pb2.ControllerPublishVolumeRequest(volume_id=id_, node_id=node, volume_capability=block())
    return dict(
        (await cluster.controller.ControllerPublishVolume(request, timeout=TIMEOUT_S)).publish_context
    )


async def unpublish(cluster, id_, node):
    request = csi_pb2.ControllerUnpublishVolumeRequest(volume_id=id_, node_id=node)
    await cluster.controller.ControllerUnpublishVolume(request, timeout=TIMEOUT_S)


async def test_a_volume_is_made_grown_cut_restored_and_deleted(shared, server):
    volume = await create_when_known(shared, "v", parameters={"pool": "remote"}, nodes=("n1",))
    assert not volume.accessible_topology
    found = shared.volume(volume.volume_id)
    assert (found["spec"]["nodeName"], found["status"]["state"]) == ("", "Ready")
    grown = await expand(shared, volume.volume_id, volume.capacity_bytes + MIB)
    assert grown.capacity_bytes >= volume.capacity_bytes + MIB
    snapshot = await shared.snapshot(volume.volume_id)
    restored = await shared.create("r", required=grown.capacity_bytes, from_snapshot=snapshot.snapshot_id)
    assert restored.capacity_bytes >= grown.capacity_bytes
    for each in (volume, restored):
        await shared.delete(each.volume_id)
    await shared.controller.DeleteSnapshot(
        csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id), timeout=TIMEOUT_S
    )
    await until(lambda: not shared.leftovers())


async def test_one_node_after_the_other_uses_it_and_its_status_says_which(shared):
    volume = await create_when_known(shared, "v", parameters={"pool": "remote"})
    id_ = volume.volume_id
    first = await publish(shared, id_, "n1")
    assert shared.volume(id_)["status"]["attachment"] == {"node": "n1", "state": "published"}
    assert (await failure(publish(shared, id_, "n2"))).code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "n1" in (await failure(shared.delete(id_))).details()
    await unpublish(shared, id_, "n1")
    assert not shared.volume(id_)["status"]["attachment"]
    second = await publish(shared, id_, "n2")
    assert int(second["epoch"]) > int(first["epoch"])


async def test_a_volume_on_a_node_is_published_there_and_nowhere_else(shared):
    volume = await create_when_known(shared, "v", parameters={"pool": "default"}, nodes=("n1",))
    assert await publish(shared, volume.volume_id, "n1") == {}
    assert (
        await failure(publish(shared, volume.volume_id, "n2"))
    ).code() is grpc.StatusCode.FAILED_PRECONDITION
    answer = await shared.controller.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=TIMEOUT_S)
    assert [list(entry.status.published_node_ids) for entry in answer.entries] == [["n1"]]
    await unpublish(shared, volume.volume_id, "n1")


async def test_an_export_made_beforehand_is_attached_as_its_server_says(cluster, server, monkeypatch):
    """There is no pool, so no controller is asked: kubelet hands the attributes of the PersistentVolume to the node."""
    node = await cluster.start_node("n1")
    await server.create("v1", 4 * MIB)
    export = await server.publish("v1", "n1", read_only=False, shared=False)
    specs = []
    attach = node.agent.attach

    async def attaching(spec):
        specs.append(spec)
        return await attach(spec)

    monkeypatch.setattr(node.agent, "attach", attaching)
    request = csi_pb2.NodeStageVolumeRequest(
        volume_id="erp/db 1",
        staging_target_path=str(cluster.directory / "staging"),
        volume_capability=block(),
        volume_context={"uri": export.uri, "blockSize": "4096"},
    )
    async with grpc.aio.insecure_channel(f"unix:{node.config.endpoint}") as channel:
        stub = csi_pb2_grpc.NodeStub(channel)
        error = await failure(stub.NodeStageVolume(request, timeout=TIMEOUT_S))
        assert "erp/db 1" in error.details()  # a fake agent has no device, so the stage ends here
        request.volume_capability.CopyFrom(block(Mode.MULTI_NODE_MULTI_WRITER))
        unfenced = await failure(stub.NodeStageVolume(request, timeout=TIMEOUT_S))
    assert [(spec.backend.uri, spec.capacity_bytes, spec.block_size_bytes) for spec in specs] == [
        (export.uri, 4 * MIB, 4096)
    ]
    assert len(list((node.config.state_dir / "foreign").iterdir())) == 1
    assert unfenced.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "nobody fences" in unfenced.details()
