"""Volumes whose pools are on nodes: what the controller is asked, the node does, and the objects tell."""

import asyncio

import grpc
import pytest

from csi_vduse.agent.model import AttachSpec
from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.errors import Unavailable
from csi_vduse.kube.resources import CORE_NODES, FINALIZER, NODES, SNAPSHOTS, VOLUMES
from csi_vduse.proto import csi_pb2
from csi_vduse.services import copies, node_status, node_work, remote, waiting
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.topology import TOPOLOGY_KEY
from tests.unit.cluster.conftest import TIMEOUT_S, known_nodes, until
from tests.unit.services.stack import GIB, MIB


async def failure(call):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call
    return caught.value


async def create_when_known(cluster, *args, **fields):
    """The controller's copy of the API comes a moment later than the API."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                return await cluster.create(*args, **fields)
            except grpc.aio.AioRpcError as error:
                if error.code() is not grpc.StatusCode.INVALID_ARGUMENT or "pool" not in error.details():
                    raise


async def expand(cluster, id_, required, limit=0):
    request = csi_pb2.ControllerExpandVolumeRequest(
        volume_id=id_, capacity_range=csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit)
    )
    return await cluster.controller.ControllerExpandVolume(request, timeout=TIMEOUT_S)


async def attach(node, id_):
    spec = AttachSpec(volume_id=id_, backend=NullBackend(), capacity_bytes=4 * MIB)
    await node.agent.attach(spec)


async def test_a_volume_is_made_on_the_node_that_is_asked_for(cluster):
    first, second = await cluster.start_node("n1"), await cluster.start_node("n2")
    await known_nodes(cluster, "n1", "n2")
    volume = await create_when_known(cluster, "v", nodes=("n2",))
    assert volume.accessible_topology[0].segments[TOPOLOGY_KEY] == "n2"
    assert second.image(volume.volume_id).stat().st_size == 4 * MIB
    assert not first.image(volume.volume_id).exists()
    found = cluster.volume(volume.volume_id)
    assert (found["status"]["state"], found["status"]["capacity"]) == ("Ready", "4Mi")
    assert found["metadata"]["finalizers"] == [FINALIZER]


async def test_the_same_request_gives_the_same_volume_and_another_is_refused(cluster, one_node):
    volume = await create_when_known(cluster)
    one_node.image(volume.volume_id).write_bytes(b"x" * 4 * MIB)
    assert (await cluster.create()).volume_id == volume.volume_id
    assert one_node.image(volume.volume_id).read_bytes()[:1] == b"x"
    error = await failure(cluster.create(required=8 * MIB))
    assert error.code() is grpc.StatusCode.ALREADY_EXISTS


async def test_delete_takes_image_and_object_away(cluster, one_node):
    volume = await create_when_known(cluster)
    await cluster.delete(volume.volume_id)
    assert cluster.leftovers() == []
    await cluster.delete(volume.volume_id)


async def test_what_kubectl_deletes_goes_the_same_way(cluster, one_node):
    volume = await create_when_known(cluster)
    await cluster.api.delete(VOLUMES, volume.volume_id)
    await until(lambda: cluster.leftovers() == [])


async def test_an_attached_volume_is_not_deleted(cluster, one_node):
    volume = await create_when_known(cluster)
    await attach(one_node, volume.volume_id)
    await until(lambda: cluster.volume(volume.volume_id)["status"].get("attachment"))
    error = await failure(cluster.delete(volume.volume_id))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "n1" in error.details()
    # Somebody who deletes the object itself deletes nothing either, until it is detached.
    await cluster.api.delete(VOLUMES, volume.volume_id)
    await until(
        lambda: "attached" in cluster.volume(volume.volume_id)["status"].get("error", {}).get("message", "")
    )
    assert one_node.image(volume.volume_id).exists()
    await one_node.agent.detach(volume.volume_id)
    await until(lambda: cluster.leftovers() == [])


async def test_a_volume_goes_at_once_when_it_is_detached_though_the_next_try_is_far_off(
    cluster, one_node, monkeypatch
):
    monkeypatch.setattr(node_work, "_FIRST_DELAY_S", 10 * TIMEOUT_S)
    volume = await create_when_known(cluster)
    await attach(one_node, volume.volume_id)
    await until(lambda: cluster.volume(volume.volume_id)["status"].get("attachment"))
    await cluster.api.delete(VOLUMES, volume.volume_id)
    await until(lambda: cluster.volume(volume.volume_id)["status"].get("error"))
    await one_node.agent.detach(volume.volume_id)
    await until(lambda: cluster.leftovers() == [])


async def test_what_an_attempt_writes_does_not_bring_the_next_one(cluster, one_node, monkeypatch):
    """Its own statuses came back through the watch: an application was held still again after a moment, for ever."""
    volume = await create_when_known(cluster)
    await attach(one_node, volume.volume_id)
    await until(lambda: cluster.volume(volume.volume_id)["status"].get("attachment"))
    monkeypatch.setattr(node_work, "_FIRST_DELAY_S", 10 * TIMEOUT_S)
    one_node.agent.fail["quiesce"] = Unavailable("the worker is dead")
    asking = asyncio.create_task(cluster.snapshot(volume.volume_id))
    path = SNAPSHOTS.named(snapshot_id("s"))
    await until(lambda: (cluster.server.object(path) or {}).get("status", {}).get("error"))
    await asyncio.sleep(0.5)
    assert one_node.agent.events.count(f"quiesce {volume.volume_id}") == 1
    # Somebody who wants something else is not kept waiting.
    await cluster.api.delete(SNAPSHOTS, snapshot_id("s"))
    await until(lambda: cluster.server.object(path) is None)
    asking.cancel()


async def test_a_copy_that_does_not_fit_its_hold_is_refused_and_not_tried_again(
    cluster, one_node, monkeypatch
):
    monkeypatch.setattr(copies, "_FIXED_S", 1e-6)
    monkeypatch.setattr(copies, "_BYTES_PER_S", 1 << 60)
    volume = await create_when_known(cluster)
    await attach(one_node, volume.volume_id)
    error = await failure(cluster.snapshot(volume.volume_id))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "detach" in error.details()
    await until(lambda: cluster.server.object(SNAPSHOTS.named(snapshot_id("s"))) is None)
    assert one_node.agent.events.count(f"quiesce {volume.volume_id}") == 1


async def test_expand_grows_the_image_on_its_node(cluster, one_node):
    volume = await create_when_known(cluster)
    answer = await expand(cluster, volume.volume_id, 8 * MIB)
    assert (answer.capacity_bytes, answer.node_expansion_required) == (8 * MIB, True)
    assert one_node.image(volume.volume_id).stat().st_size == 8 * MIB
    assert cluster.volume(volume.volume_id)["status"]["capacity"] == "8Mi"


async def test_an_expansion_that_its_node_refuses_is_answered_and_taken_back(cluster, one_node):
    volume = await create_when_known(cluster)
    one_node.image(volume.volume_id).unlink()
    error = await failure(expand(cluster, volume.volume_id, 8 * MIB))
    assert error.code() is grpc.StatusCode.DATA_LOSS
    assert cluster.volume(volume.volume_id)["spec"]["capacityBytes"] == 4 * MIB


async def test_a_volume_too_large_for_every_node_is_refused_before_anything_is_made(cluster, one_node):
    await create_when_known(cluster, "small")
    error = await failure(cluster.create("huge", required=1 << 60))
    assert error.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(cluster.leftovers()) == 2


async def test_what_a_node_cannot_make_is_answered_with_its_words_and_leaves_nothing(cluster, one_node):
    await create_when_known(cluster, "first")
    (one_node.pool / "pool.json").unlink()  # as when its file system is not mounted
    error = await failure(cluster.create("second"))
    assert error.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "pool.json" in error.details()
    await until(lambda: cluster.server.object(VOLUMES.named(volume_id("second"))) is None)


async def test_a_node_that_is_down_is_waited_for_and_the_next_call_goes_on(cluster, one_node, monkeypatch):
    await create_when_known(cluster, "first")
    await cluster.stop("n1")
    monkeypatch.setattr(waiting, "WAIT_S", 0.3)
    error = await failure(cluster.create("second"))
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    monkeypatch.setattr(waiting, "WAIT_S", TIMEOUT_S)
    waiting_call = asyncio.create_task(cluster.create("second"))
    await cluster.start_node("n1")
    assert one_node.image((await waiting_call).volume_id).exists()


async def test_snapshot_restore_and_clone_carry_the_data(cluster, one_node):
    volume = await create_when_known(cluster)
    with one_node.image(volume.volume_id).open("r+b") as image:
        image.write(b"precious")
    snapshot = await cluster.snapshot(volume.volume_id)
    assert (snapshot.ready_to_use, snapshot.size_bytes) == (True, 4 * MIB)
    restored = await cluster.create("restored", from_snapshot=snapshot.snapshot_id)
    clone = await cluster.create("clone", from_volume=volume.volume_id)
    for copy in (restored, clone):
        assert one_node.image(copy.volume_id).read_bytes()[:8] == b"precious"
        assert copy.accessible_topology[0].segments[TOPOLOGY_KEY] == "n1"
    again = await cluster.snapshot(volume.volume_id)
    assert again == snapshot
    for each in (volume, restored, clone):
        await cluster.delete(each.volume_id)
    request = csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot.snapshot_id)
    await cluster.controller.DeleteSnapshot(request, timeout=TIMEOUT_S)
    assert cluster.leftovers() == []


async def test_limits_reach_an_attached_volume(cluster, one_node):
    volume = await create_when_known(cluster)
    await attach(one_node, volume.volume_id)
    request = csi_pb2.ControllerModifyVolumeRequest(
        volume_id=volume.volume_id, mutable_parameters={"maxIops": "500"}
    )
    await cluster.controller.ControllerModifyVolume(request, timeout=TIMEOUT_S)
    assert one_node.agent.attachments[volume.volume_id].spec.throttle.iops == 500
    assert cluster.volume(volume.volume_id)["spec"]["throttle"]["iops"] == 500


async def test_capacity_is_that_of_the_place(cluster, one_node):
    await create_when_known(cluster)

    async def capacity(node, **parameters):
        request = csi_pb2.GetCapacityRequest(parameters=parameters)
        request.accessible_topology.segments[TOPOLOGY_KEY] = node
        return (await cluster.controller.GetCapacity(request, timeout=TIMEOUT_S)).available_capacity

    here = await capacity("n1")
    assert here > GIB / 1024
    assert await capacity("n2") == 0
    error = await failure(capacity("n1", pool="unknown"))
    assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "default" in error.details()


async def test_the_api_may_be_away_and_everything_goes_on_when_it_is_back(cluster, one_node):
    volume = await create_when_known(cluster)
    await cluster.server.go_away()
    error = await failure(cluster.create("later"))
    assert error.code() is grpc.StatusCode.UNAVAILABLE
    await attach(one_node, volume.volume_id)
    cluster.server.away = False
    later = await create_when_known(cluster, "later")
    assert one_node.image(later.volume_id).exists()
    await until(lambda: cluster.volume(volume.volume_id)["status"].get("attachment"))


async def test_a_node_that_left_the_cluster_takes_its_volumes_along(cluster, one_node):
    volume = await create_when_known(cluster)
    await cluster.stop("n1")
    await cluster.api.delete(NODES, "n1")  # what the garbage collector does when the Node is deleted
    await cluster.delete(volume.volume_id)
    assert cluster.server.object(VOLUMES.named(volume.volume_id)) is None


async def test_a_plugin_that_runs_on_does_not_bring_a_node_back_that_left(cluster, one_node, monkeypatch):
    """It made its VduseNode anew without an owner, and the volumes of the node could never be deleted."""
    monkeypatch.setattr(node_status, "NODE_PERIOD_S", 0.05)
    await cluster.stop("n1")
    await cluster.start_node("n1")
    volume = await create_when_known(cluster)
    node = cluster.server.object(CORE_NODES.named("n1"))
    await cluster.api.delete(CORE_NODES, "n1")
    await cluster.api.delete(NODES, "n1")  # as the garbage collector does
    asked = cluster.server.requests.count("GET /api/v1/nodes/n1")
    await until(lambda: cluster.server.requests.count("GET /api/v1/nodes/n1") > asked + 3)
    assert cluster.server.object(NODES.named("n1")) is None
    # The Node may come back: a kubelet that runs registers it again.
    await cluster.server.put(CORE_NODES.named("n1"), {**node, "metadata": {"name": "n1", "uid": "other"}})
    await until(lambda: (cluster.server.object(NODES.named("n1")) or {}).get("status"))
    owner = cluster.server.object(NODES.named("n1"))["metadata"]["ownerReferences"][0]
    assert owner["uid"] == "other"
    await cluster.delete(volume.volume_id)


async def test_health_tells_of_a_lost_image(cluster, one_node, monkeypatch):
    monkeypatch.setattr("csi_vduse.services.node_status._IMAGE_PERIOD_S", 0.05)
    volume = await create_when_known(cluster)
    await cluster.stop("n1")
    one_node.image(volume.volume_id).unlink()
    await cluster.start_node("n1")
    await until(
        lambda: cluster.volume(volume.volume_id)["status"].get("health", {}).get("status") == "Inaccessible"
    )
    request = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
    answer = await cluster.controller.ControllerGetVolume(request, timeout=TIMEOUT_S)
    assert answer.volume.volume_id == volume.volume_id


async def test_the_pod_s_node_is_owner_of_what_is_told_about_it(cluster, one_node):
    owner = cluster.server.object(NODES.named("n1"))["metadata"]["ownerReferences"][0]
    assert (owner["kind"], owner["uid"]) == (
        "Node",
        cluster.server.object(CORE_NODES.named("n1"))["metadata"]["uid"],
    )


def test_waiting_is_shorter_than_what_sidecars_wait():
    assert remote.WAIT_S <= 120
