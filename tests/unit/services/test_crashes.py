"""Killed at any step: a retry of the same call converges, and deleting everything leaves nothing.

Each scenario is run once to count its steps (calls to registry and pool), then again for every step with the
process killed before, and after, that step acted. A new process starts on the same directories, reconciles,
repeats the call, and cleans up.
"""

import shutil
from dataclasses import replace

import pytest

from csi_vduse.services.reconcile import FinishSnapshotDelete, FinishVolumeDelete, ForgetExpansion, plan
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.model import State
from tests.unit.backends.builders import a_snapshot, a_volume
from tests.unit.services.stack import MIB, Killed, Life, Stack


async def nothing(_stack):
    return


async def a_source(stack):
    await stack.create("source")
    stack.write(volume_id("source"), b"data")


async def a_source_and_snapshot(stack):
    await a_source(stack)
    await stack.snapshot(volume_id("source"))


async def create(stack):
    return await stack.create()


async def clone(stack):
    volume = await stack.create("v", from_volume=volume_id("source"), required=8 * MIB)
    assert stack.read(volume.volume_id, 4) == b"data"
    assert stack.image(volume.volume_id).stat().st_size == 8 * MIB
    return volume


async def restore(stack):
    volume = await stack.create("v", from_snapshot=snapshot_id("s"))
    assert stack.read(volume.volume_id, 4) == b"data"
    return volume


async def expand(stack):
    answer = await stack.expand(volume_id("source"), 8 * MIB)
    assert stack.image(volume_id("source")).stat().st_size == answer.capacity_bytes == 8 * MIB
    return answer


async def snapshot(stack):
    snapshot = await stack.snapshot(volume_id("source"))
    assert snapshot.ready_to_use
    assert stack.read(snapshot.snapshot_id, 4) == b"data"
    return snapshot


async def delete(stack):
    await stack.delete(volume_id("source"))
    assert not stack.image(volume_id("source")).exists()


async def delete_snapshot(stack):
    await stack.delete_snapshot(snapshot_id("s"))
    assert not stack.image(snapshot_id("s")).exists()


SCENARIOS = {
    "create": (nothing, create),
    "clone": (a_source, clone),
    "restore": (a_source_and_snapshot, restore),
    "expand": (a_source, expand),
    "snapshot": (a_source, snapshot),
    "delete": (a_source, delete),
    "delete_snapshot": (a_source_and_snapshot, delete_snapshot),
}


async def prepared(directory, prepare):
    directory.mkdir()
    stack = Stack(directory)
    await prepare(stack)
    stack.close()


async def empty(stack):
    """Delete everything through the API; nothing may be left."""
    for volume in await stack.registry.list_volumes():
        await stack.delete(volume.id)
    for one in await stack.registry.list_snapshots():
        await stack.delete_snapshot(one.id)
    assert stack.leftovers() == []


@pytest.mark.parametrize("after_the_act", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_killed_at_any_step_a_retry_converges_and_nothing_leaks(tmp_path, scenario, after_the_act):
    prepare, act = SCENARIOS[scenario]
    await prepared(tmp_path / "template", prepare)
    life = Life()
    counted = Stack(_copy(tmp_path, "count"), life=life)
    await act(counted)
    counted.close()
    assert life.log
    for step in range(len(life.log)):
        directory = _copy(tmp_path, f"step{step}")
        doomed = Stack(directory, life=Life(step, after_the_act=after_the_act))
        with pytest.raises(Killed):
            await act(doomed)
        doomed.close()
        successor = Stack(directory)
        await successor.start()
        answer = await act(successor)
        assert await act(successor) == answer
        await empty(successor)
        successor.close()


@pytest.mark.parametrize("scenario", SCENARIOS)
async def test_killed_at_any_step_without_a_retry_everything_can_still_be_deleted(tmp_path, scenario):
    prepare, act = SCENARIOS[scenario]
    await prepared(tmp_path / "template", prepare)
    step = 0
    while True:
        directory = _copy(tmp_path, f"step{step}")
        doomed = Stack(directory, life=Life(step, after_the_act=True))
        try:
            await act(doomed)
        except Killed:
            pass
        else:
            doomed.close()
            break
        doomed.close()
        successor = Stack(directory)
        await successor.start()
        await empty(successor)
        successor.close()
        step += 1
    assert step > 1


async def test_start_removes_unfinished_images_and_finishes_deletes(tmp_path):
    await prepared(tmp_path / "template", a_source)
    directory = _copy(tmp_path, "run")
    unfinished = directory / "default/volumes/vol-0123456789abcdef.00000000.tmp"
    unfinished.mkdir()
    (unfinished / "image.raw").write_bytes(b"half")
    stack = Stack(directory)
    volume = await stack.registry.get_volume(volume_id("source"))
    await stack.registry.put_volume(replace(volume, state=State.DELETING))
    await stack.start()
    assert stack.leftovers() == []
    stack.close()


async def test_start_goes_on_when_a_pool_is_away(tmp_path):
    stack = Stack(tmp_path, pool_names=("a", "b"))
    volume = await stack.create(parameters={"pool": "a"})
    (tmp_path / "b").rename(tmp_path / "gone")
    await stack.start()
    assert stack.image(volume.volume_id, "a").exists()
    assert not (tmp_path / "b").exists()
    stack.close()


def test_the_plan_names_what_was_interrupted_and_nothing_else():
    deleting = a_volume("d", state=State.DELETING)
    expanding = a_volume("e", state=State.READY, expanding_to_bytes=8 * MIB)
    volumes = [deleting, expanding, a_volume("c", state=State.CREATING), a_volume("r", state=State.READY)]
    gone = a_snapshot("d", state=State.DELETING)
    snapshots = [gone, a_snapshot("c", state=State.CREATING), a_snapshot("r", state=State.READY)]
    assert plan(volumes, snapshots) == [
        FinishVolumeDelete(deleting),
        ForgetExpansion(expanding),
        FinishSnapshotDelete(gone),
    ]


def _copy(tmp_path, name):
    shutil.copytree(tmp_path / "template", tmp_path / name)
    return tmp_path / name
