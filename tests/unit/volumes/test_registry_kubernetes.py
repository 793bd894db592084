"""The registry in the Kubernetes API: the same promises as the directory's, and none lost to other writers."""

import asyncio
from dataclasses import replace

import pytest

from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import DataLoss, NotFound, OutOfRange, Unavailable
from csi_vduse.kube.api import at
from csi_vduse.kube.resources import FINALIZER, SNAPSHOTS, VOLUMES
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, State
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry
from tests.unit.fakes.kubernetes_api import fake_api
from tests.unit.volumes.test_registry_directory import a_snapshot, a_volume

ID = volume_id("v")


@pytest.fixture
async def server():
    async with fake_api() as running:
        yield running


@pytest.fixture
async def api(server):
    client = at(server.url)
    yield client
    await client.close()


def dated(volume, found):
    """The API sets the time of creation, in seconds."""
    return replace(volume, created_at_ns=objects.wanted_volume(found).created_at_ns)


async def test_a_volume_survives_the_way_through_the_api(api, server):
    registry = KubernetesRegistry(api)
    volume = a_volume(node="n1", throttle=Throttle(500, 1 << 20, 2.0), expanding_to_bytes=2 << 20)
    await registry.put_volume(volume)
    assert await registry.get_volume(ID) == dated(volume, server.object(VOLUMES.named(ID)))
    assert [each.id for each in await registry.list_volumes()] == [ID]
    await registry.put_snapshot(a_snapshot())
    assert await registry.get_snapshot(snapshot_id("s")) == a_snapshot()
    assert await registry.list_snapshots() == [a_snapshot()]


async def test_an_object_that_its_node_has_not_begun_is_no_volume_yet(api):
    await api.create(VOLUMES, objects.volume_object(a_volume(node="n1")))
    registry = KubernetesRegistry(api, node="n1")
    assert await registry.get_volume(ID) is None
    assert await registry.list_volumes() == []
    with pytest.raises(NotFound):
        await registry.update_volume(ID, lambda volume: volume)


async def test_a_node_lists_its_own_and_makes_no_objects(api):
    controller, node = KubernetesRegistry(api), KubernetesRegistry(api, node="n1")
    await controller.put_volume(a_volume("mine", node="n1"))
    await controller.put_volume(a_volume("other", node="n2"))
    assert [volume.name for volume in await node.list_volumes()] == ["mine"]
    with pytest.raises(NotFound):
        await node.put_volume(a_volume("new", node="n1"))


async def test_a_write_between_our_read_and_our_write_is_not_lost(api, server):
    registry = KubernetesRegistry(api)
    await registry.put_volume(a_volume(filesystem=None))

    async def another_writes():
        await server.set_status(VOLUMES.named(ID), capacityBytes=8 << 20)

    server.before_put.append(another_writes)
    record = FilesystemRecord("xfs", FilesystemState.FORMATTING, "11111111-1111-4111-8111-111111111111")
    await registry.update_volume(ID, lambda volume: replace(volume, filesystem=record))
    volume = await registry.get_volume(ID)
    assert (volume.filesystem, volume.capacity_bytes) == (record, 8 << 20)


async def test_concurrent_updates_of_one_record_all_count(api):
    registry = KubernetesRegistry(api)
    await registry.put_volume(a_volume(capacity_bytes=0))

    def grow(volume):
        return replace(volume, capacity_bytes=volume.capacity_bytes + 1)

    await asyncio.gather(*(registry.update_volume(ID, grow) for _ in range(5)))
    assert (await registry.get_volume(ID)).capacity_bytes == 5


async def test_writing_a_status_never_touches_the_spec(api, server):
    registry = KubernetesRegistry(api)
    await registry.put_volume(a_volume(node="n1"))
    before = server.object(VOLUMES.named(ID))
    await KubernetesRegistry(api, node="n1").put_volume(a_volume("v", node="elsewhere", capacity_bytes=4096))
    after = server.object(VOLUMES.named(ID))
    assert after["spec"] == before["spec"]
    assert after["metadata"]["generation"] == before["metadata"]["generation"]
    assert after["status"]["capacityBytes"] == 4096


async def test_deleting_keeps_the_object_until_its_node_has_said_so(api, server):
    controller, node = KubernetesRegistry(api), KubernetesRegistry(api, node="n1")
    await controller.put_volume(a_volume(node="n1"))
    await api.delete(VOLUMES, ID)
    assert (await node.get_volume(ID)).state is State.DELETING
    await node.delete_volume(ID)
    found = server.object(VOLUMES.named(ID))
    assert found["status"] == {"state": objects.DELETED}
    assert found["metadata"]["finalizers"] == [FINALIZER]
    assert await node.get_volume(ID) is None


async def test_discarding_an_unfinished_try_makes_it_not_begun_again(api, server):
    controller, node = KubernetesRegistry(api), KubernetesRegistry(api, node="n1")
    await controller.put_volume(a_volume(node="n1", state=State.CREATING))
    await node.delete_volume(ID)
    assert server.object(VOLUMES.named(ID))["status"] == {}
    await node.put_volume(a_volume(node="n1"))
    assert (await node.get_volume(ID)).state is State.READY


async def test_unknown_objects_are_none_and_deleting_them_is_fine(api):
    registry = KubernetesRegistry(api)
    assert await registry.get_volume(ID) is None
    assert await registry.get_volume("../vdusenodes/n1") is None
    assert await registry.get_snapshot(snapshot_id("s")) is None
    await registry.delete_volume(ID)
    await registry.delete_snapshot("snap-x")


async def test_an_api_that_is_away_is_unavailable(api, server):
    registry = KubernetesRegistry(api)
    server.away = True
    with pytest.raises(Unavailable):
        await registry.get_volume(ID)
    with pytest.raises(Unavailable):
        await registry.list_volumes()


async def test_a_foreign_object_is_data_loss_and_named(api, server):
    await server.put(
        VOLUMES.named(ID),
        {"kind": "VduseVolume", "metadata": {"name": ID}, "spec": {}, "status": {"state": "Ready"}},
    )
    with pytest.raises(DataLoss, match=ID):
        await KubernetesRegistry(api).get_volume(ID)


def test_an_error_is_told_for_the_spec_that_it_was_about_only():
    found = {
        "metadata": {"generation": 3},
        "status": {"error": objects.error_status(OutOfRange("too big", hint="less"), 3)},
    }
    error = objects.error_from_status(found)
    assert isinstance(error, OutOfRange)
    assert (error.message, error.hint) == ("too big", "less")
    found["metadata"]["generation"] = 4
    assert objects.error_from_status(found) is None


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0"), (10 << 30, "10Gi"), (1536 << 20, "1536Mi"), (4096 + 512, "4608")]
)
def test_sizes_are_shown_exactly(size, text):
    assert objects.quantity(size) == text


async def test_snapshots_are_deleted_as_volumes_are(api, server):
    controller, node = KubernetesRegistry(api), KubernetesRegistry(api, node="n1")
    await controller.put_snapshot(replace(a_snapshot(), node="n1"))
    await api.delete(SNAPSHOTS, snapshot_id("s"))
    await node.delete_snapshot(snapshot_id("s"))
    assert server.object(SNAPSHOTS.named(snapshot_id("s")))["status"] == {"state": objects.DELETED}


async def test_how_far_a_copy_is_is_told_while_it_is_made_and_not_after(api, server):
    registry = KubernetesRegistry(api)

    def tell():
        return registry.update_status(VOLUMES, ID, lambda now: objects.with_progress(now, 1 << 20, 3 << 20))

    await registry.put_volume(a_volume(state=State.CREATING))
    await tell()
    status = server.object(VOLUMES.named(ID))["status"]
    assert (status["copiedBytes"], status["totalBytes"], status["copied"]) == (1 << 20, 3 << 20, "33%")
    assert (await registry.get_volume(ID)).state is State.CREATING
    await registry.put_volume(a_volume(state=State.READY))
    await tell()  # a word that comes late
    assert "copied" not in server.object(VOLUMES.named(ID))["status"]
