"""Volumes of a storage server over the controller: real server, real daemon, content seen through NBD."""

import time
from unittest.mock import AsyncMock

import pytest

from csi_vduse.agent.renewal import renewed
from csi_vduse.backends.nbd import NbdPool, data_path, parse_location
from csi_vduse.backends.pools import open_pools
from csi_vduse.config import parse_pool
from csi_vduse.dataplane.backend_spec import NbdBackend, NbdTls
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
)
from csi_vduse.proto import csi_pb2
from csi_vduse.services.foreign import foreign_volumes
from csi_vduse.storage.client import Granted, StorageClient
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from csi_vduse.volumes.ids import volume_id
from tests.unit.services.stack import (
    MIB,
    NODE,
    OTHER_NODE,
    Killed,
    Life,
    Mode,
    Stack,
    block,
    create_request,
    mount,
)
from tests.unit.storage.nbd_client import CutOff, NbdClient, Refused
from tests.unit.storage.use import config_in


@pytest.fixture
def config(tmp_path):
    return config_in(tmp_path, "images")


@pytest.fixture
async def server(config):
    server = StorageServer(config)
    async with server.running(), listening(config, server):
        yield server


@pytest.fixture
def stack(config, tmp_path):
    location = parse_location(str(config.control))
    pool = NbdPool("remote", location, memory=tmp_path / "state/pools/remote.json")
    stack = Stack(tmp_path, pool_names=(), more=(pool,))
    yield stack
    stack.close()


async def publish(stack, volume, node=NODE, capability=None, *, readonly=False):
    request = csi_pb2.ControllerPublishVolumeRequest(
        volume_id=volume.volume_id,
        node_id=node,
        volume_capability=capability or block(),
        readonly=readonly,
    )
    return dict((await stack.controller.ControllerPublishVolume(request, None)).publish_context)


async def unpublish(stack, volume, node=NODE):
    request = csi_pb2.ControllerUnpublishVolumeRequest(volume_id=volume.volume_id, node_id=node)
    await stack.controller.ControllerUnpublishVolume(request, None)


async def published_nodes(stack):
    answer = await stack.controller.ListVolumes(csi_pb2.ListVolumesRequest(), None)
    return {entry.volume.volume_id: list(entry.status.published_node_ids) for entry in answer.entries}


async def test_a_volume_can_be_used_from_anywhere(server, stack):
    volume = await stack.create(nodes=("elsewhere",))
    assert not volume.accessible_topology
    assert dict(volume.volume_context)["backend"] == "nbd"


async def test_publishing_is_offered(stack):
    answer = await stack.controller.ControllerGetCapabilities(
        csi_pb2.ControllerGetCapabilitiesRequest(), None
    )
    offered = {one.rpc.type for one in answer.capabilities}
    rpc = csi_pb2.ControllerServiceCapability.RPC
    assert {rpc.PUBLISH_UNPUBLISH_VOLUME, rpc.PUBLISH_READONLY, rpc.LIST_VOLUMES_PUBLISHED_NODES} <= offered


async def test_each_publication_is_an_epoch_and_its_end_a_fence(server, stack):
    volume = await stack.create()
    told = await publish(stack, volume)
    assert await publish(stack, volume) == told
    assert await published_nodes(stack) == {volume.volume_id: [NODE]}
    with pytest.raises(FailedPrecondition, match=NODE):
        await publish(stack, volume, OTHER_NODE)
    with pytest.raises(AlreadyExists):
        await publish(stack, volume, readonly=True)
    old = NbdClient(told["uri"])
    old.write(0, b"first" + bytes(507))
    await unpublish(stack, volume)
    await unpublish(stack, volume)
    told_there = await publish(stack, volume, OTHER_NODE)
    assert (told["epoch"], told_there["epoch"]) == ("1", "2")
    with pytest.raises(CutOff):
        old.write(0, bytes(512))
    with pytest.raises(Refused):
        NbdClient(told["uri"])
    new = NbdClient(told_there["uri"])
    assert new.read(0, 5) == b"first"
    old.close()
    new.close()


async def test_a_node_that_had_its_export_renewed_is_published_as_before_and_its_server_says_how_large_it_is(
    server, stack, config, tmp_path
):
    volume = await stack.create()
    told = await publish(stack, volume)
    assert told["control"] == str(config.control)
    asked = data_path(volume.volume_id, told)
    node = NbdClient((await renewed(asked, None)).uri)
    assert await publish(stack, volume) == told
    with foreign_volumes(tmp_path / "foreign") as foreign:
        assert (await foreign.ask(asked)).size_bytes == volume.capacity_bytes
    assert node.read(0, 1) == bytes(1), "asking has cut the node off"
    node.close()


async def test_a_server_of_an_earlier_release_is_not_asked_for_what_it_cannot(server, stack, monkeypatch):
    volume = await stack.create()
    granted = Granted(1, "nbd+unix:///x?socket=/s")
    monkeypatch.setattr(StorageClient, "publish", AsyncMock(return_value=granted))
    assert "control" not in await publish(stack, volume)


async def test_a_node_that_may_only_read_is_told_so(server, stack):
    """A PersistentVolume with csi.readOnly: its access mode does not say so, and the node has no other way to know."""
    volume = await stack.create()
    told = await publish(stack, volume, readonly=True)
    assert told["readOnly"] == "true"
    client = NbdClient(told["uri"])
    assert client.read_only
    client.close()
    await unpublish(stack, volume)
    assert "readOnly" not in await publish(stack, volume)


async def test_unpublish_without_a_node_takes_the_volume_from_all(server, stack):
    volume = await stack.create()
    reader = block(Mode.MULTI_NODE_READER_ONLY)
    for node in (NODE, OTHER_NODE):
        client = NbdClient((await publish(stack, volume, node, reader))["uri"])
        assert client.read_only
        client.close()
    await unpublish(stack, volume, "")
    assert await published_nodes(stack) == {volume.volume_id: []}
    await unpublish(stack, csi_pb2.Volume(volume_id="vol-0000000000000000"))


async def test_a_server_that_is_away_is_not_asked_about_volumes_of_another(server, config, tmp_path):
    here = NbdPool("remote", parse_location(str(config.control)), memory=tmp_path / "state/pools/remote.json")
    away = NbdPool(
        "away", parse_location(f"unix:{tmp_path}/none.sock"), memory=tmp_path / "state/pools/away.json"
    )
    stack = Stack(tmp_path, pool_names=(), more=(here, away))
    volume = await stack.create(parameters={"pool": "remote"})
    await publish(stack, volume)
    request = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
    answer = await stack.controller.ControllerGetVolume(request, None)
    assert list(answer.status.published_node_ids) == [NODE]
    await unpublish(stack, volume)
    await stack.delete(volume.volume_id)
    stack.close()


async def test_many_writers_are_two_nodes_with_a_raw_disk(server, stack):
    shared = block(Mode.MULTI_NODE_MULTI_WRITER)
    volume = await stack.create(capabilities=(shared,))
    await publish(stack, volume, NODE, shared)
    await publish(stack, volume, OTHER_NODE, shared)
    assert await published_nodes(stack) == {volume.volume_id: [NODE, OTHER_NODE]}
    with pytest.raises(InvalidArgument, match="raw block only"):
        await stack.create("w", capabilities=(mount("ext4", Mode.MULTI_NODE_MULTI_WRITER),))


async def test_unknown_volumes_and_nodes_are_not_found(server, stack):
    volume = await stack.create()
    with pytest.raises(NotFound, match="node 'n9'"):
        await publish(stack, volume, "n9")
    with pytest.raises(NotFound, match="volume"):
        await publish(stack, csi_pb2.Volume(volume_id="vol-0000000000000000"))


async def test_a_published_volume_is_not_deleted_and_stays_usable(server, stack):
    volume = await stack.create()
    told = await publish(stack, volume)
    with pytest.raises(FailedPrecondition, match=f"published at {NODE}"):
        await stack.delete(volume.volume_id)
    assert await publish(stack, volume) == told
    await unpublish(stack, volume)
    await stack.delete(volume.volume_id)
    assert await server.volumes() == []


async def test_snapshots_and_clones_of_a_volume_in_use_do_not_hold_its_worker(server, stack):
    volume = await stack.create()
    client = NbdClient((await publish(stack, volume))["uri"])
    client.write(MIB, b"kept" + bytes(508))
    snapshot = await stack.snapshot(volume.volume_id)
    client.write(MIB, bytes(512))
    copy = await stack.create("copy", required=8 * MIB, from_snapshot=snapshot.snapshot_id)
    twin = await stack.create("twin", from_volume=volume.volume_id)
    for one, expected in ((copy, b"kept"), (twin, bytes(4))):
        reader = NbdClient((await publish(stack, one))["uri"])
        assert reader.read(MIB, 4) == expected
        assert reader.size_bytes == one.capacity_bytes
        reader.close()
    assert not [event for event in stack.agent.events if "quiesce" in event]
    client.close()


async def test_a_volume_grows_at_the_server_first(server, stack):
    volume = await stack.create()
    told = await publish(stack, volume)
    answer = await stack.expand(volume.volume_id, 8 * MIB)
    assert (answer.capacity_bytes, answer.node_expansion_required) == (8 * MIB, True)
    client = NbdClient(told["uri"])
    assert client.size_bytes == 8 * MIB
    client.close()


async def test_a_server_that_is_away_is_unavailable_and_not_a_hang(stack):
    begun_s = time.monotonic()
    with pytest.raises((Unavailable, DeadlineExceeded)):
        await stack.create()
    assert time.monotonic() - begun_s < 60


async def test_an_image_that_is_gone_is_told(server, stack, config):
    volume = await stack.create()
    next(config.directory.glob("volumes/*/image.raw")).unlink()
    request = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
    answer = await stack.controller.ControllerGetVolume(request, None)
    assert b"missing" in answer.SerializeToString()


async def test_another_pool_at_the_same_address_is_refused(server, stack, config):
    await stack.create()
    mark = config.directory / "pool.json"
    mark.write_text(mark.read_text().replace(await server.pool_id(), "0123456789abcdef"))
    with pytest.raises(FailedPrecondition, match="another pool"):
        await stack.create("w")
    with pytest.raises(FailedPrecondition, match="another pool"):
        await stack.delete("vol-" + (await stack.registry.list_volumes())[0].id.removeprefix("vol-"))


async def test_calls_by_a_client_may_be_repeated(server, config):
    client = StorageClient(config.control, None)
    for _ in range(2):
        await client.create("v1", MIB)
        await client.expand("v1", 2 * MIB)
        await client.unpublish("v1")
    assert await client.publications() == {}
    await client.close()


async def test_an_export_made_beforehand_is_published_without_a_server(stack):
    request = csi_pb2.ControllerPublishVolumeRequest(
        volume_id="erp",
        node_id=NODE,
        volume_capability=mount("ext4"),
        volume_context={"uri": "nbd://10.0.0.9/erp"},
    )
    answer = await stack.controller.ControllerPublishVolume(request, None)
    assert dict(answer.publish_context) == {"uri": "nbd://10.0.0.9/erp"}
    request.readonly = True
    answer = await stack.controller.ControllerPublishVolume(request, None)
    assert dict(answer.publish_context) == {"uri": "nbd://10.0.0.9/erp", "readOnly": "true"}
    request.volume_capability.CopyFrom(block(Mode.MULTI_NODE_MULTI_WRITER))
    with pytest.raises(InvalidArgument, match="nobody fences"):
        await stack.controller.ControllerPublishVolume(request, None)
    request.volume_context["uri"] = "http://x"
    with pytest.raises(InvalidArgument):
        await stack.controller.ControllerPublishVolume(request, None)


def test_where_a_pool_is(tmp_path):
    assert parse_location("unix:/run/x.sock").tls_dir is None
    remote = parse_location("storage.example?tls=/etc/c&node-tls=/etc/n")
    assert str(remote.address) == "storage.example:10808"
    assert (str(remote.tls_dir), str(remote.node_tls_dir)) == ("/etc/c", "/etc/n")
    for wrong, said in (
        ("storage.example:1", "has no tls="),
        ("unix:/x?tls=rel", "absolute"),
        ("unix:/x?tsl=/y", "unknown option 'tsl'"),
        ("unix:x", "absolute"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            open_pools([parse_pool(f"p=nbd:{wrong}")], tmp_path)


def test_a_node_needs_what_publishing_told_and_its_certificates(tmp_path):
    assert data_path("v", {"uri": "nbd://h/e"}) == NbdBackend("nbd://h/e")
    through = {"uri": "nbd://h/e", "writeThrough": "true"}
    assert data_path("v", through) == NbdBackend("nbd://h/e", write_through=True)
    over_tls = {"uri": "nbds://h/e", "tlsDirectory": str(tmp_path), "control": "h:1"}
    assert data_path("v", over_tls) == NbdBackend("nbds://h/e", NbdTls(tmp_path))
    assert data_path("v", over_tls).control == data_path("v", {**through, "control": "h:1"}).control == "h:1"
    with pytest.raises(FailedPrecondition, match="not published"):
        data_path("v", {})
    with pytest.raises(FailedPrecondition, match="no certificates"):
        data_path("v", {"uri": "nbds://h/e"})


async def test_file_volumes_beside_them_are_published_on_their_own_node_only(server, config, tmp_path):
    pool = NbdPool("remote", parse_location(str(config.control)), memory=tmp_path / "memory.json")
    stack = Stack(tmp_path, pool_names=("local",), more=(pool,))
    request = create_request(parameters={"pool": "local"})
    volume = (await stack.controller.CreateVolume(request, None)).volume
    assert await publish(stack, volume) == {}
    assert await publish(stack, volume, readonly=True) == {"readOnly": "true"}
    with pytest.raises(FailedPrecondition, match=NODE):
        await publish(stack, volume, OTHER_NODE)
    stack.close()


def a_process(directory, config, life=None):
    """A controller with the storage server's pool; its records are in `directory`."""
    memory = directory / "state/pools/remote.json"
    pool = NbdPool("remote", parse_location(str(config.control)), memory=memory)
    return Stack(directory, pool_names=(), more=(pool,), life=life)


async def clone(stack):
    return await stack.create("copy", required=8 * MIB, from_volume=volume_id("source"))


async def snapshot(stack):
    return await stack.snapshot(volume_id("source"))


@pytest.mark.parametrize("after_the_act", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("copy", [clone, snapshot])
async def test_killed_at_any_step_of_a_copy_the_next_process_goes_on_and_nothing_leaks(
    server, config, tmp_path, copy, after_the_act
):
    step, is_killed = 0, True
    while is_killed:
        directory = tmp_path / f"step{step}"
        directory.mkdir()
        await a_process(directory, config).create("source")
        try:
            await copy(a_process(directory, config, Life(step, after_the_act=after_the_act)))
        except Killed:
            step += 1
        else:
            is_killed = False
        successor = a_process(directory, config)
        await successor.start()
        assert await copy(successor) == await copy(successor)
        for volume in await successor.registry.list_volumes():
            await successor.delete(volume.id)
        for one in await successor.registry.list_snapshots():
            await successor.delete_snapshot(one.id)
        assert not list(config.directory.glob("*/*-*"))
    assert step > 1
