"""Snapshots, clones and restores over the controller: consistent, independent, complete or absent."""

from dataclasses import replace

import pytest

from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.backends import copying
from csi_vduse.backends.base import MAX_HOLD_S
from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Pending,
    Unavailable,
)
from csi_vduse.proto import csi_pb2
from csi_vduse.services import copies
from csi_vduse.services.locks import Keys
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState
from csi_vduse.volumes.model import State as RecordState
from tests.unit.services.stack import MIB, Stack, create_request, mount

FORMATTED = FilesystemRecord("xfs", FilesystemState.FORMATTED)


async def list_snapshots(stack, **fields):
    answer = await stack.controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(**fields), None)
    return [entry.snapshot for entry in answer.entries]


async def get_snapshot(stack, id_):
    return (await stack.controller.GetSnapshot(csi_pb2.GetSnapshotRequest(snapshot_id=id_), None)).snapshot


@pytest.fixture
async def volume(stack):
    volume = await stack.create()
    stack.write(volume.volume_id, b"data")
    return volume


async def test_a_snapshot_holds_the_volume_as_it_was(stack, volume):
    snapshot = await stack.snapshot(volume.volume_id)
    stack.write(volume.volume_id, b"NEWS")
    assert snapshot.ready_to_use
    assert snapshot.size_bytes == 4 * MIB
    assert snapshot.source_volume_id == volume.volume_id
    assert snapshot.creation_time.seconds > 0
    assert stack.read(snapshot.snapshot_id, 4) == b"data"


async def test_the_same_request_gives_the_same_snapshot(stack, volume):
    snapshot = await stack.snapshot(volume.volume_id)
    stack.write(volume.volume_id, b"NEWS")
    assert await stack.snapshot(volume.volume_id) == snapshot
    assert stack.read(snapshot.snapshot_id, 4) == b"data"
    await stack.delete(volume.volume_id)
    assert await stack.snapshot(volume.volume_id) == snapshot


async def test_the_same_name_for_another_volume_already_exists(stack, volume):
    await stack.snapshot(volume.volume_id)
    other = await stack.create("other")
    with pytest.raises(AlreadyExists, match="is of volume"):
        await stack.snapshot(other.volume_id)


@pytest.mark.parametrize(
    ("volume_id", "name", "error"),
    [
        ("", "s", InvalidArgument),
        (volume_id("v"), "", InvalidArgument),
        (volume_id("v"), "x" * 300, InvalidArgument),
        (volume_id("v"), "../s", InvalidArgument),
        (volume_id("none"), "s", NotFound),
        ("../../etc", "s", NotFound),
    ],
)
async def test_a_bad_request_leaves_nothing(stack, volume, volume_id, name, error):
    before = stack.leftovers()
    with pytest.raises(error):
        await stack.snapshot(volume_id, name)
    assert stack.leftovers() == before


async def test_unknown_snapshot_parameters_are_named(stack, volume):
    request = csi_pb2.CreateSnapshotRequest(
        source_volume_id=volume.volume_id, name="s", parameters={"a": "b"}
    )
    with pytest.raises(InvalidArgument, match="unknown parameter 'a'"):
        await stack.controller.CreateSnapshot(request, None)


async def test_deleting_a_snapshot_leaves_nothing_and_can_be_repeated(stack, volume):
    before = stack.leftovers()
    snapshot = await stack.snapshot(volume.volume_id)
    for _ in range(2):
        await stack.delete_snapshot(snapshot.snapshot_id)
    assert stack.leftovers() == before
    await stack.delete_snapshot("../../etc/passwd")
    with pytest.raises(InvalidArgument):
        await stack.delete_snapshot("")


async def test_restore_and_clone_have_the_data_and_know_their_source(stack, volume):
    snapshot = await stack.snapshot(volume.volume_id)
    restored = await stack.create("restored", from_snapshot=snapshot.snapshot_id)
    clone = await stack.create("clone", from_volume=volume.volume_id, required=8 * MIB)
    assert restored.content_source.snapshot.snapshot_id == snapshot.snapshot_id
    assert clone.content_source.volume.volume_id == volume.volume_id
    assert clone.capacity_bytes == stack.image(clone.volume_id).stat().st_size == 8 * MIB
    for copy in (restored, clone):
        assert stack.read(copy.volume_id, 4) == b"data"
        stack.write(copy.volume_id, b"NEWS")
    assert stack.read(volume.volume_id, 4) == stack.read(snapshot.snapshot_id, 4) == b"data"


async def test_copies_are_independent_of_their_source(stack, volume):
    snapshot = await stack.snapshot(volume.volume_id)
    restored = await stack.create("restored", from_snapshot=snapshot.snapshot_id)
    await stack.delete(volume.volume_id)
    await stack.delete_snapshot(snapshot.snapshot_id)
    assert stack.read(restored.volume_id, 4) == b"data"
    assert await stack.create("restored", from_snapshot=snapshot.snapshot_id) == restored


async def test_a_copy_without_a_size_has_that_of_its_source(stack, volume):
    request = create_request("clone", from_volume=volume.volume_id)
    request.ClearField("capacity_range")
    clone = (await stack.controller.CreateVolume(request, None)).volume
    assert clone.capacity_bytes == volume.capacity_bytes


async def test_a_copy_is_never_smaller_than_its_source(stack, volume):
    with pytest.raises(OutOfRange, match="needs 4194304"):
        await stack.create("clone", from_volume=volume.volume_id, required=MIB, limit=2 * MIB)


async def test_copies_inherit_the_file_system_record(stack, volume):
    stored = await stack.registry.get_volume(volume.volume_id)
    await stack.registry.put_volume(replace(stored, filesystem=FORMATTED))
    snapshot = await stack.snapshot(volume.volume_id)
    like = {"capabilities": (mount("xfs"),), "required": 300 * MIB}
    restored = await stack.create("restored", from_snapshot=snapshot.snapshot_id, **like)
    clone = await stack.create("clone", from_volume=volume.volume_id, **like)
    for copy in (restored, clone):
        assert (await stack.registry.get_volume(copy.volume_id)).filesystem == FORMATTED


async def test_a_copy_stays_in_the_pool_of_its_source(tmp_path):
    stack = Stack(tmp_path, pool_names=("a", "b"))
    source = await stack.create(parameters={"pool": "b"})
    clone = await stack.create("clone", from_volume=source.volume_id)
    assert clone.volume_context["pool"] == "b"
    with pytest.raises(InvalidArgument, match="is in pool 'b', not 'a'"):
        await stack.create("other", from_volume=source.volume_id, parameters={"pool": "a"})
    stack.close()


# Volumes in use.


@pytest.fixture
async def attached(stack, volume):
    await stack.agent.attach(AttachSpec(volume.volume_id, NullBackend(), 4 * MIB))
    stack.agent.events.clear()
    return volume


async def test_an_attached_volume_is_held_while_it_is_copied(stack, attached, monkeypatch):
    held = []

    def copy(*args, **kwargs):
        held.append(stack.agent.is_held(attached.volume_id))
        return original(*args, **kwargs)

    original = copying.copy_image
    monkeypatch.setattr("csi_vduse.backends.file.copy_image", copy)
    await stack.snapshot(attached.volume_id)
    await stack.create("clone", from_volume=attached.volume_id)
    assert held == [True, True]
    assert not stack.agent.held_until_s
    held_and_resumed = [f"quiesce {attached.volume_id}", f"resume {attached.volume_id}"]
    assert [event for event in stack.agent.events if event != "list"] == held_and_resumed * 2


async def test_a_volume_goes_on_after_a_failed_copy_and_nothing_is_left(stack, attached, monkeypatch):
    before = stack.leftovers()
    without_time_to_copy(monkeypatch)
    with pytest.raises(FailedPrecondition, match="detach"):
        await stack.snapshot(attached.volume_id)
    assert not stack.agent.held_until_s
    assert stack.leftovers() == before


def a_copy_that_takes_seconds(monkeypatch, seconds):
    """As for a volume of so many blocks, in a pool where copies share none."""
    monkeypatch.setattr(copies, "_BYTES_PER_S", 4096 / seconds)

    async def no(_self):
        return False

    monkeypatch.setattr("csi_vduse.backends.file.FilePool.shares_blocks", no)


async def test_nobody_s_io_waits_for_long_unless_the_pool_allows_it(stack, attached, monkeypatch):
    before = stack.leftovers()
    a_copy_that_takes_seconds(monkeypatch, 60)
    for copy in (stack.snapshot(attached.volume_id), stack.create("c", from_volume=attached.volume_id)):
        with pytest.raises(FailedPrecondition, match=r"about 60 s.*allows 10 s.*max-hold-seconds"):
            await copy
    assert not [event for event in stack.agent.events if "quiesce" in event]
    assert stack.leftovers() == before
    await stack.agent.detach(attached.volume_id)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_pool_may_allow_long_holds(stack, attached, monkeypatch):
    a_copy_that_takes_seconds(monkeypatch, 60)
    monkeypatch.setattr(stack.backends[0], "_max_hold_s", 120)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_copy_that_shares_blocks_takes_no_time_whatever_its_size(stack, attached, monkeypatch):
    a_copy_that_takes_seconds(monkeypatch, 60)

    async def yes(_self):
        return True

    monkeypatch.setattr("csi_vduse.backends.file.FilePool.shares_blocks", yes)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


def without_time_to_copy(monkeypatch):
    monkeypatch.setattr(copies, "_FIXED_S", 1e-6)
    monkeypatch.setattr(copies, "_BYTES_PER_S", 1 << 60)


async def hold_in_vain(stack, attached, monkeypatch):
    with monkeypatch.context() as slow:
        without_time_to_copy(slow)
        with pytest.raises(FailedPrecondition, match="longer than"):
            await stack.snapshot(attached.volume_id)


async def test_a_volume_that_was_held_in_vain_is_spared_for_a_while(stack, attached, monkeypatch):
    """Sidecars try again after seconds, for ever: the application stood still most of the time."""
    monkeypatch.setattr(copies, "_SPARED_FACTOR", 1e9)
    await hold_in_vain(stack, attached, monkeypatch)
    stack.agent.events.clear()
    for attempt in (stack.snapshot(attached.volume_id), stack.create("c", from_volume=attached.volume_id)):
        with pytest.raises(FailedPrecondition, match="not held again"):
            await attempt
    assert f"quiesce {attached.volume_id}" not in stack.agent.events
    await stack.agent.detach(attached.volume_id)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_volume_that_was_held_in_vain_is_held_again_some_day(stack, attached, monkeypatch):
    monkeypatch.setattr(copies, "_SPARED_FACTOR", 0)
    await hold_in_vain(stack, attached, monkeypatch)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_worker_that_is_slow_to_hold_still_is_asked_again(stack, attached):
    stack.agent.fail["quiesce"] = DeadlineExceeded("requests in flight do not end")
    with pytest.raises(DeadlineExceeded):
        await stack.snapshot(attached.volume_id)
    del stack.agent.fail["quiesce"]
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_volume_whose_worker_is_dead_is_not_copied(stack, attached):
    before = stack.leftovers()
    stack.agent.set_state(attached.volume_id, State.WORKER_DEAD)
    with pytest.raises(Unavailable):
        await stack.snapshot(attached.volume_id)
    assert stack.leftovers() == before


async def test_a_hold_whose_answer_is_lost_is_ended_at_once(stack, attached, monkeypatch):
    hold = stack.agent.quiesce

    async def lost(volume_id, hold_s):
        await hold(volume_id, hold_s)
        raise DeadlineExceeded("the worker did not answer in time")

    monkeypatch.setattr(stack.agent, "quiesce", lost)
    with pytest.raises(DeadlineExceeded):
        await stack.snapshot(attached.volume_id)
    assert not stack.agent.held_until_s


async def test_a_copy_counts_even_if_resume_fails_for_the_hold_ends_by_itself(stack, attached):
    """As long as the agent still tells of the worker that held; without the agent nobody knows."""
    stack.agent.fail["resume"] = DeadlineExceeded("the worker did not answer in time")
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


@pytest.fixture
def during_the_copy(monkeypatch):
    """Lets something happen after the copy's bytes are there and before it is known to be good."""

    def arrange(act):
        def copy(*args, **kwargs):
            original(*args, **kwargs)
            act()

        original = copying.copy_image
        monkeypatch.setattr("csi_vduse.backends.file.copy_image", copy)

    return arrange


@pytest.mark.parametrize("as_it_ends", ["another serves", "dead", "broken", "detached"])
async def test_a_copy_whose_worker_died_under_it_does_not_count(stack, attached, during_the_copy, as_it_ends):
    """It was READY, and a silent mixture: the next worker knew of no hold and wrote under the copy."""

    def die():
        match as_it_ends:
            case "another serves":
                stack.agent.replace_worker(attached.volume_id)
            case "dead":
                stack.agent.set_state(attached.volume_id, State.WORKER_DEAD)
            case "broken":
                stack.agent.set_state(attached.volume_id, State.BROKEN)
            case "detached":
                del stack.agent.attachments[attached.volume_id]

    during_the_copy(die)
    before = stack.leftovers()
    with pytest.raises(Unavailable, match="discarded"):
        await stack.snapshot(attached.volume_id)
    assert stack.leftovers() == before


async def test_a_clone_whose_source_s_worker_died_under_it_does_not_count(stack, attached, during_the_copy):
    before = stack.leftovers()
    during_the_copy(lambda: stack.agent.replace_worker(attached.volume_id))
    with pytest.raises(Unavailable, match="discarded"):
        await stack.create("clone", from_volume=attached.volume_id)
    assert stack.leftovers() == before


async def test_a_worker_that_dies_between_the_look_and_the_hold_makes_no_copy(stack, attached, monkeypatch):
    hold = stack.agent.quiesce

    async def late(volume_id, hold_s):
        await hold(volume_id, hold_s)
        stack.agent.replace_worker(volume_id)

    monkeypatch.setattr(stack.agent, "quiesce", late)
    with pytest.raises(Unavailable, match="discarded"):
        await stack.snapshot(attached.volume_id)


async def test_a_copy_does_not_count_if_nobody_knows_whose_worker_serves(stack, attached, during_the_copy):
    before = stack.leftovers()
    during_the_copy(lambda: stack.agent.fail.update(list=Unavailable("no agent")))
    with pytest.raises(Unavailable, match="no agent"):
        await stack.snapshot(attached.volume_id)
    assert stack.leftovers() == before


async def test_the_image_of_a_broken_device_can_be_copied(stack, attached):
    stack.agent.set_state(attached.volume_id, State.BROKEN)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


async def test_a_hold_is_never_longer_than_the_agent_allows(stack, attached, monkeypatch):
    monkeypatch.setattr(copies, "_BYTES_PER_S", 0.001)
    monkeypatch.setattr(stack.backends[0], "_max_hold_s", MAX_HOLD_S)
    a_copy_that_takes_seconds(monkeypatch, MAX_HOLD_S - 1)
    assert (await stack.snapshot(attached.volume_id)).ready_to_use


# Lists.


async def test_an_unfinished_snapshot_is_told_by_get_only_and_cannot_be_restored(stack, volume):
    snapshot = await stack.snapshot(volume.volume_id)
    stored = await stack.registry.get_snapshot(snapshot.snapshot_id)
    await stack.registry.put_snapshot(replace(stored, state=RecordState.CREATING))
    assert not (await get_snapshot(stack, snapshot.snapshot_id)).ready_to_use
    assert await list_snapshots(stack) == []
    with pytest.raises(Unavailable, match="not ready to use"):
        await stack.create("restored", from_snapshot=snapshot.snapshot_id)


async def test_snapshots_are_found_by_id_and_by_volume(stack, volume):
    other = await stack.create("other")
    mine = await stack.snapshot(volume.volume_id, "s1")
    theirs = await stack.snapshot(other.volume_id, "s2")
    assert await list_snapshots(stack) == [mine, theirs]
    assert await list_snapshots(stack, snapshot_id=mine.snapshot_id) == [mine]
    assert await list_snapshots(stack, source_volume_id=other.volume_id) == [theirs]
    assert await list_snapshots(stack, source_volume_id=other.volume_id, snapshot_id=mine.snapshot_id) == []
    assert await list_snapshots(stack, snapshot_id="unknown") == []
    assert await get_snapshot(stack, mine.snapshot_id) == mine
    with pytest.raises(NotFound):
        await get_snapshot(stack, snapshot_id("none"))


# What is excluded meanwhile.


@pytest.mark.parametrize("is_attached", [True, False], ids=["attached", "detached"])
async def test_a_volume_of_a_file_pool_is_neither_attached_nor_detached_while_it_is_copied(
    stack, volume, during_the_copy, is_attached
):
    if is_attached:
        await stack.agent.attach(AttachSpec(volume.volume_id, NullBackend(), 4 * MIB))
    staging, met = Keys(frozenset({volume.volume_id})), []

    def stage():
        with pytest.raises(Pending):
            stack.locks.acquire(staging)
        met.append(True)

    during_the_copy(stage)
    await stack.snapshot(volume.volume_id)
    assert met
    stack.locks.acquire(staging)
    with pytest.raises(Pending):
        await stack.snapshot(volume.volume_id, "while it is being staged")


async def test_a_restore_excludes_nothing_but_the_deletion_of_its_snapshot(stack, volume, during_the_copy):
    snapshot = await stack.snapshot(volume.volume_id)
    held = []
    during_the_copy(lambda: held.extend(stack.locks.held))
    await stack.create("restored", from_snapshot=snapshot.snapshot_id)
    assert held == []
