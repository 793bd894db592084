"""Volumes over the controller: created once, refused clearly, deleted without a trace."""

import os
from dataclasses import replace

import pytest

from csi_vduse.agent.model import AttachSpec
from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    ResourceExhausted,
    Unavailable,
)
from csi_vduse.proto import csi_compat_pb2, csi_pb2
from csi_vduse.volumes.ids import volume_id
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, State
from csi_vduse.volumes.topology import TOPOLOGY_KEY
from tests.unit.services.stack import GIB, MIB, NODE, Mode, Stack, block, create_request, mount


async def attach(stack, id_):
    return await stack.agent.attach(AttachSpec(id_, NullBackend(), 4 * MIB))


async def test_create_answers_what_the_volume_is(stack):
    volume = await stack.create(parameters={"queues": "2", "csi.storage.k8s.io/pvc/name": "data"})
    assert volume.volume_id == volume_id("v")
    assert volume.capacity_bytes == 4 * MIB
    assert dict(volume.volume_context) == {
        "backend": "file",
        "pool": "default",
        "bus": "virtio_vdpa",
        "queues": "2",
        "queueSize": "256",
        "blockSize": "512",
    }
    assert [dict(topology.segments) for topology in volume.accessible_topology] == [{TOPOLOGY_KEY: NODE}]
    assert not volume.HasField("content_source")
    assert stack.image(volume.volume_id).stat().st_size == 4 * MIB


async def test_without_a_range_a_volume_has_the_default_size(stack):
    request = create_request()
    request.ClearField("capacity_range")
    assert (await stack.controller.CreateVolume(request, None)).volume.capacity_bytes == GIB


async def test_the_same_request_gives_the_same_volume_with_its_data(stack):
    first = await stack.create()
    stack.write(first.volume_id, b"data")
    assert await stack.create() == first
    assert stack.read(first.volume_id, 4) == b"data"


async def test_a_compatible_request_gives_the_same_volume(stack):
    first = await stack.create(required=4 * MIB)
    assert await stack.create(required=2 * MIB, limit=8 * MIB, capabilities=(block(),)) == first


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"required": 8 * MIB}, "capacity"),
        ({"required": MIB, "limit": 2 * MIB}, "capacity"),
        ({"parameters": {"queues": "2"}}, "queues"),
        ({"parameters": {"bus": "vhost_vdpa"}, "capabilities": (block(),)}, "bus"),
        ({"parameters": {"blockSize": "4096"}}, "blockSize"),
        ({"capabilities": (block(Mode.MULTI_NODE_MULTI_WRITER),)}, "MULTI_NODE_MULTI_WRITER"),
        ({"from_volume": volume_id("other")}, "source"),
        ({"nodes": ("n2",)}, "topology"),
    ],
)
async def test_the_same_name_for_something_else_already_exists(stack, fields, named):
    await stack.create()
    with pytest.raises(AlreadyExists, match=named):
        await stack.create(**fields)


async def test_two_names_with_one_id_are_not_mixed_up(stack, monkeypatch):
    first = await stack.create("one")
    monkeypatch.setattr("csi_vduse.services.provisioning.volume_id_of", lambda _name: first.volume_id)
    with pytest.raises(AlreadyExists, match="choose another name"):
        await stack.create("two")


# What can be wrong with a request. Each leaves nothing behind.


def _without_mode():
    capability = block()
    capability.ClearField("access_mode")
    return capability


@pytest.mark.parametrize(
    ("fields", "error", "named"),
    [
        ({"name": ""}, InvalidArgument, "name is missing"),
        ({"name": "x" * 300}, InvalidArgument, "300 bytes; allowed: 128"),
        ({"name": "\N{SNOWMAN}" * 43}, InvalidArgument, "129 bytes; allowed: 128"),
        ({"name": "a/b"}, InvalidArgument, "no '/' and no '..'"),
        ({"name": "../../etc"}, InvalidArgument, "no '/' and no '..'"),
        ({"name": ".."}, InvalidArgument, "no '/' and no '..'"),
        ({"name": "."}, InvalidArgument, "no '/' and no '..'"),
        ({"name": "a\nb"}, InvalidArgument, "control characters"),
        ({"required": 0}, InvalidArgument, "neither required_bytes nor limit_bytes"),
        ({"required": -1}, InvalidArgument, "negative"),
        ({"required": 8 * MIB, "limit": 4 * MIB}, InvalidArgument, "limit_bytes 4194304 is less"),
        ({"required": 1, "limit": 1}, OutOfRange, "smallest possible volume has 1048576"),
        ({"required": (1 << 63) - 1}, OutOfRange, "more than a volume can have"),
        ({"required": 1 << 60}, ResourceExhausted, "bytes left"),
        ({"required": MIB, "limit": 2 * MIB, "capabilities": (mount("xfs"),)}, OutOfRange, "314572800"),
        ({"parameters": {"size": "big"}}, InvalidArgument, "unknown parameter 'size'; allowed: pool, bus"),
        (
            {"parameters": {"pool": "nowhere"}},
            InvalidArgument,
            "pool: 'nowhere' is not a pool here; allowed: default",
        ),
        ({"capabilities": (mount("ntfs"),)}, InvalidArgument, "allowed: ext4, xfs, btrfs"),
        (
            {"capabilities": (csi_pb2.VolumeCapability(access_mode=block().access_mode),)},
            InvalidArgument,
            "block, mount",
        ),
        ({"capabilities": (_without_mode(),)}, InvalidArgument, "access_mode 0 is missing or unknown"),
        ({"capabilities": (block(Mode.MULTI_NODE_READER_ONLY),)}, InvalidArgument, "MULTI_NODE_READER_ONLY"),
        (
            {"capabilities": (mount(), block(Mode.MULTI_NODE_MULTI_WRITER))},
            InvalidArgument,
            "MULTI_NODE_MULTI_WRITER",
        ),
        (
            {"parameters": {"bus": "vhost_vdpa"}, "capabilities": (mount(),)},
            InvalidArgument,
            "volumeMode: Block",
        ),
        ({"from_volume": volume_id("none")}, NotFound, "does not exist"),
        ({"from_volume": "../x"}, NotFound, "does not exist"),
        ({"from_snapshot": "snap-0000000000000000"}, NotFound, "does not exist"),
        ({"nodes": ("n2", "n3")}, ResourceExhausted, "WaitForFirstConsumer"),
    ],
)
async def test_a_bad_request_is_refused_with_its_reason_and_leaves_nothing(stack, fields, error, named):
    with pytest.raises(error) as caught:
        await stack.create(**fields)
    assert named in str(caught.value)
    assert stack.leftovers() == []


async def test_no_capabilities_are_refused(stack):
    request = create_request()
    request.ClearField("volume_capabilities")
    with pytest.raises(InvalidArgument, match="volume_capabilities is missing"):
        await stack.controller.CreateVolume(request, None)


async def test_an_empty_source_is_refused(stack):
    request = create_request()
    request.volume_content_source.SetInParent()
    with pytest.raises(InvalidArgument, match="snapshot, volume"):
        await stack.controller.CreateVolume(request, None)


async def test_the_largest_name_and_the_placement_here_are_fine(stack):
    await stack.create("x" * 128, nodes=("n2", NODE))


async def test_xfs_gets_the_room_that_it_needs(stack):
    volume = await stack.create(required=MIB, capabilities=(mount("xfs"),))
    assert volume.capacity_bytes == 300 * MIB


async def test_with_several_pools_one_must_be_named_unless_one_is_the_default(tmp_path):
    for names, expected in ((("a", "b"), None), (("a", "default"), "default")):
        stack = Stack(tmp_path, pool_names=names)
        if expected is None:
            with pytest.raises(InvalidArgument, match="parameter pool is missing; allowed: a, b"):
                await stack.create()
        else:
            assert (await stack.create()).volume_context["pool"] == expected
        stack.close()


async def test_a_pool_that_fails_leaves_no_record(stack, tmp_path):
    await stack.create("first")
    before = stack.leftovers()
    (tmp_path / "default").rename(tmp_path / "gone")
    with pytest.raises(FailedPrecondition, match="create or mount it"):
        await stack.create("second")
    (tmp_path / "gone").rename(tmp_path / "default")
    assert stack.leftovers() == before


async def test_an_image_without_a_record_is_neither_adopted_nor_overwritten(stack, tmp_path):
    volume = await stack.create()
    stack.write(volume.volume_id, b"data")
    (tmp_path / "state/registry/volumes" / f"{volume.volume_id}.json").unlink()
    with pytest.raises(FailedPrecondition, match="that no record knows of"):
        await stack.create()
    assert stack.read(volume.volume_id, 4) == b"data"


# Capacity.


async def test_promises_never_exceed_the_pool(stack):
    left = (await stack.controller.GetCapacity(csi_pb2.GetCapacityRequest(), None)).available_capacity
    half = left // 2 // 4096 * 4096
    first = await stack.create("a", required=half)
    with pytest.raises(ResourceExhausted, match="pool 'default' has"):
        await stack.create("b", required=left - half + 64 * MIB)
    with pytest.raises(ResourceExhausted, match="more are needed"):
        await stack.expand(first.volume_id, left + 64 * MIB)
    assert (await stack.registry.get_volume(first.volume_id)).reserved_bytes == half
    await stack.delete(first.volume_id)
    await stack.create("b", required=half)


async def test_capacity_answers_for_the_place_and_use_that_are_asked(stack):
    async def ask(**fields):
        return await stack.controller.GetCapacity(csi_pb2.GetCapacityRequest(**fields), None)

    everything = await ask()
    assert everything.available_capacity > 0
    assert everything.maximum_volume_size.value == everything.available_capacity
    assert everything.minimum_volume_size.value == MIB
    here = csi_pb2.Topology(segments={TOPOLOGY_KEY: NODE})
    there = csi_pb2.Topology(segments={TOPOLOGY_KEY: "n2"})
    assert (await ask(accessible_topology=here, parameters={"pool": "default"})).available_capacity > 0
    assert (await ask(accessible_topology=there)).available_capacity == 0
    assert (await ask(volume_capabilities=[block(Mode.MULTI_NODE_MULTI_WRITER)])).available_capacity == 0
    assert (await ask(volume_capabilities=[mount("xfs")])).minimum_volume_size.value == 300 * MIB
    with pytest.raises(InvalidArgument, match="pool"):
        await ask(parameters={"pool": "nowhere"})


# Delete.


async def test_delete_leaves_nothing_and_can_be_repeated(stack):
    volume = await stack.create()
    await stack.delete(volume.volume_id)
    assert stack.leftovers() == []
    await stack.delete(volume.volume_id)


@pytest.mark.parametrize("unknown", ["no-such-volume", "../../etc/passwd", volume_id("none")])
async def test_deleting_an_unknown_volume_is_fine(stack, unknown):
    await stack.delete(unknown)


async def test_delete_without_an_id_is_refused(stack):
    with pytest.raises(InvalidArgument, match="volume_id is missing"):
        await stack.delete("")


async def test_an_attached_volume_is_not_deleted(stack):
    volume = await stack.create()
    await attach(stack, volume.volume_id)
    with pytest.raises(FailedPrecondition, match="is in use"):
        await stack.delete(volume.volume_id)
    assert stack.image(volume.volume_id).exists()
    await stack.agent.detach(volume.volume_id)
    await stack.delete(volume.volume_id)


async def test_nothing_is_deleted_while_the_agent_does_not_answer(stack):
    volume = await stack.create()
    stack.agent.fail["list"] = Unavailable("no agent")
    with pytest.raises(Unavailable):
        await stack.delete(volume.volume_id)
    assert stack.image(volume.volume_id).exists()


async def test_a_volume_whose_image_was_lost_can_be_deleted(stack):
    volume = await stack.create()
    stack.image(volume.volume_id).unlink()
    await stack.delete(volume.volume_id)
    assert stack.leftovers() == []


async def test_a_pool_taken_out_of_the_configuration_keeps_its_volumes(tmp_path):
    both = Stack(tmp_path, pool_names=("a", "b"))
    volume = await both.create(parameters={"pool": "b"})
    both.close()
    one = Stack(tmp_path, pool_names=("a",))
    with pytest.raises(FailedPrecondition, match="pool 'b' is not configured any more"):
        await one.delete(volume.volume_id)
    one.close()


# Expand.


async def test_expand_grows_the_image_and_sends_the_node_after(stack):
    volume = await stack.create()
    answer = await stack.expand(volume.volume_id, 8 * MIB + 1)
    assert answer.capacity_bytes == 8 * MIB + 4096
    assert answer.node_expansion_required
    assert stack.image(volume.volume_id).stat().st_size == answer.capacity_bytes
    assert await stack.expand(volume.volume_id, 8 * MIB + 1) == answer


async def test_expand_below_the_present_size_changes_nothing(stack):
    volume = await stack.create()
    assert (await stack.expand(volume.volume_id, MIB)).capacity_bytes == 4 * MIB


async def test_expand_keeps_what_the_node_recorded(stack):
    volume = await stack.create()
    record = FilesystemRecord("ext4", FilesystemState.FORMATTED)
    stored = await stack.registry.get_volume(volume.volume_id)
    await stack.registry.put_volume(replace(stored, filesystem=record))
    await stack.expand(volume.volume_id, 8 * MIB)
    assert (await stack.registry.get_volume(volume.volume_id)).filesystem == record


async def test_expand_refusals_are_clear(stack):
    volume = await stack.create()
    with pytest.raises(OutOfRange, match="volumes do not shrink"):
        await stack.expand(volume.volume_id, MIB, limit=2 * MIB)
    with pytest.raises(NotFound):
        await stack.expand(volume_id("none"), 8 * MIB)
    request = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume.volume_id)
    with pytest.raises(InvalidArgument, match="capacity_range is missing"):
        await stack.controller.ControllerExpandVolume(request, None)
    with pytest.raises(ResourceExhausted):
        await stack.expand(volume.volume_id, 1 << 60)


async def test_expand_of_a_truncated_image_is_refused_and_changes_no_record(stack):
    volume = await stack.create()
    os.truncate(stack.image(volume.volume_id), MIB)
    with pytest.raises(DataLoss, match="truncated"):
        await stack.expand(volume.volume_id, 8 * MIB)
    stored = await stack.registry.get_volume(volume.volume_id)
    assert (stored.capacity_bytes, stored.expanding_to_bytes) == (4 * MIB, 0)


# Questions.


async def test_validate_confirms_what_is_possible(stack):
    volume = await stack.create()

    async def ask(*capabilities, id_=volume.volume_id, **fields):
        request = csi_pb2.ValidateVolumeCapabilitiesRequest(
            volume_id=id_, volume_capabilities=capabilities, **fields
        )
        return await stack.controller.ValidateVolumeCapabilities(request, None)

    good = await ask(
        mount("ext4"), block(), volume_context=dict(volume.volume_context), parameters={"pool": "default"}
    )
    assert list(good.confirmed.volume_capabilities) == [mount("ext4"), block()]
    assert good.confirmed.volume_context == volume.volume_context
    for answer in (
        await ask(block(Mode.MULTI_NODE_MULTI_WRITER)),
        await ask(block(), volume_context={"pool": "other"}),
        await ask(block(), parameters={"queues": "9"}),
    ):
        assert not answer.HasField("confirmed")
        assert answer.message
    with pytest.raises(NotFound):
        await ask(block(), id_="unknown")
    with pytest.raises(InvalidArgument, match="volume_capabilities is missing"):
        await ask()


async def test_unfinished_volumes_are_not_shown(stack):
    volume = await stack.create()
    stored = await stack.registry.get_volume(volume.volume_id)
    for state in (State.CREATING, State.DELETING):
        await stack.registry.put_volume(replace(stored, state=state))
        assert not (await stack.controller.ListVolumes(csi_pb2.ListVolumesRequest(), None)).entries
        with pytest.raises(NotFound):
            await stack.controller.ControllerGetVolume(
                csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id), None
            )
        with pytest.raises(NotFound):
            await stack.create("clone", from_volume=volume.volume_id)


async def test_a_damaged_volume_shows_its_condition_to_1_12_callers(stack):
    volume = await stack.create()

    async def condition():
        request = csi_pb2.ControllerGetVolumeRequest(volume_id=volume.volume_id)
        answer = await stack.controller.ControllerGetVolume(request, None)
        assert answer.volume == volume
        holder = csi_compat_pb2.ConditionHolder.FromString(answer.status.SerializeToString())
        return holder.volume_condition

    assert not (await condition()).abnormal
    os.truncate(stack.image(volume.volume_id), MIB)
    assert (await condition()).abnormal
    assert "truncated" in (await condition()).message
