"""The directory registry: durable whole records, atomic updates, no id becomes a path."""

import asyncio
from dataclasses import replace

import pytest

from csi_vduse.errors import DataLoss, NotFound, Unavailable
from csi_vduse.volumes.ids import snapshot_id, volume_id
from csi_vduse.volumes.model import (
    FilesystemRecord,
    FilesystemState,
    Snapshot,
    Source,
    SourceKind,
    State,
    Volume,
    VolumeParameters,
    snapshot_from_json,
    snapshot_to_json,
    volume_from_json,
    volume_to_json,
)
from csi_vduse.volumes.registry_directory import DirectoryRegistry


def a_volume(name="v", **changes):
    volume = Volume(
        id=volume_id(name),
        name=name,
        pool="default",
        backend="file",
        capacity_bytes=1 << 20,
        parameters=VolumeParameters(),
        source=Source(SourceKind.SNAPSHOT, "snap-0000000000000000"),
        filesystem=FilesystemRecord("xfs", FilesystemState.FORMATTED),
        state=State.READY,
        created_at_ns=1,
    )
    return replace(volume, **changes)


def a_snapshot(name="s"):
    return Snapshot(
        snapshot_id(name), name, volume_id("v"), "default", 1 << 20, 5, State.CREATING, None, 4096
    )


@pytest.fixture
def registry(tmp_path):
    registry = DirectoryRegistry(tmp_path)
    yield registry
    registry.close()


def test_records_survive_the_round_trip():
    bare = a_volume(source=None, filesystem=None, expanding_to_bytes=2 << 20)
    for volume in (
        a_volume(),
        bare,
        a_volume(filesystem=FilesystemRecord("ext4", FilesystemState.FORMATTING, "u")),
    ):
        assert volume_from_json(volume_to_json(volume)) == volume
    assert snapshot_from_json(snapshot_to_json(a_snapshot())) == a_snapshot()


def test_a_record_of_a_release_that_chose_no_uuid_is_read_and_written_as_it_was():
    old = {"type": "ext4", "state": "formatting"}
    volume = volume_from_json({**volume_to_json(a_volume()), "filesystem": old})
    assert volume.filesystem == FilesystemRecord("ext4", FilesystemState.FORMATTING)
    assert volume_to_json(volume)["filesystem"] == old


async def test_a_second_registry_reads_what_the_first_wrote(registry, tmp_path):
    await registry.put_volume(a_volume())
    await registry.put_snapshot(a_snapshot())
    other = DirectoryRegistry(tmp_path)
    assert await other.get_volume(volume_id("v")) == a_volume()
    assert await other.get_snapshot(snapshot_id("s")) == a_snapshot()
    other.close()


async def test_unknown_objects_are_none_and_deleting_them_is_fine(registry):
    assert await registry.get_volume(volume_id("v")) is None
    assert await registry.get_snapshot(snapshot_id("s")) is None
    await registry.delete_volume(volume_id("v"))
    await registry.delete_snapshot(snapshot_id("s"))
    assert await registry.list_volumes() == []


@pytest.mark.parametrize(
    "hostile", ["", ".", "..", "../../etc/passwd", "vol-../../../../etc", "a\0b", "vol-" + "A" * 16]
)
async def test_an_id_of_another_form_never_becomes_a_path(registry, tmp_path, hostile):
    (tmp_path / "registry").mkdir()
    victim = tmp_path / "registry" / "victim.json"
    victim.write_text("{}")
    assert await registry.get_volume(hostile) is None
    assert await registry.get_snapshot(hostile) is None
    await registry.delete_volume(hostile)
    await registry.delete_snapshot(hostile)
    assert victim.exists()


async def test_lists_are_oldest_first(registry):
    for name, created in (("a", 3), ("b", 1), ("c", 2)):
        await registry.put_volume(a_volume(name, created_at_ns=created))
    assert [volume.name for volume in await registry.list_volumes()] == ["b", "c", "a"]


async def test_concurrent_updates_of_one_record_all_count(registry):
    await registry.put_volume(a_volume(capacity_bytes=0))

    def grow(volume):
        return replace(volume, capacity_bytes=volume.capacity_bytes + 1)

    await asyncio.gather(*(registry.update_volume(volume_id("v"), grow) for _ in range(50)))
    volume = await registry.get_volume(volume_id("v"))
    assert volume.capacity_bytes == 50


async def test_update_of_an_unknown_volume_is_not_found(registry):
    with pytest.raises(NotFound):
        await registry.update_volume(volume_id("v"), lambda volume: volume)


async def test_a_damaged_record_is_data_loss_and_names_the_file(registry, tmp_path):
    await registry.put_volume(a_volume())
    path = tmp_path / "registry" / "volumes" / f"{volume_id('v')}.json"
    path.write_text('{"version": 1, "id": "x"}')
    with pytest.raises(DataLoss, match="damaged"):
        await registry.get_volume(volume_id("v"))
    path.write_text("half a rec")
    with pytest.raises(DataLoss, match=str(path)):
        await registry.get_volume(volume_id("v"))


async def test_a_state_directory_that_is_a_file_is_a_clear_error(tmp_path):
    (tmp_path / "state").write_text("")
    registry = DirectoryRegistry(tmp_path / "state")
    with pytest.raises(Unavailable, match="check --state-dir"):
        await registry.put_volume(a_volume())
    registry.close()
