"""What a copy's file system record says is true of the copy's content, whenever it was cut."""

import asyncio
from dataclasses import replace

import pytest

from csi_vduse.backends.file import FilePool
from csi_vduse.errors import InvalidArgument
from csi_vduse.proto import csi_pb2
from csi_vduse.services.locks import Keys
from csi_vduse.volumes.ids import volume_id
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState
from tests.unit.services.stack import MIB, Stack, block, mount

FORMATTING = FilesystemRecord("ext4", FilesystemState.FORMATTING)
FORMATTED = FilesystemRecord("ext4", FilesystemState.FORMATTED)


class SharedPool(FilePool):
    """A pool that copies what is being written, as a storage server does: the copy is cut when `cut` is set."""

    kind = "nbd"
    needs_hold = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.copying = asyncio.Event()
        self.cut = asyncio.Event()

    async def clone(self, source, volume, *, copying):
        await self._gate()
        return await super().clone(source, volume, copying=copying)

    async def snapshot(self, source, snapshot, *, copying):
        await self._gate()
        return await super().snapshot(source, snapshot, copying=copying)

    async def published(self):
        return {}

    async def _gate(self):
        self.copying.set()
        await self.cut.wait()


@pytest.fixture
def pool(tmp_path):
    (tmp_path / "shared").mkdir()
    return SharedPool("shared", tmp_path / "shared", memory=tmp_path / "state/pools/shared.json")


@pytest.fixture
def stack(tmp_path, pool):
    stack = Stack(tmp_path, pool_names=(), more=(pool,))
    yield stack
    stack.close()


async def set_record(stack, volume_id, record):
    await stack.registry.update_volume(volume_id, lambda now: replace(now, filesystem=record))


async def copy_while_it_is_formatted(stack, pool, volume, copying):
    """Begin a copy while a node makes the file system, which is done, and used, before the copy is cut."""
    await set_record(stack, volume.volume_id, FORMATTING)
    task = asyncio.create_task(copying)
    await pool.copying.wait()
    await set_record(stack, volume.volume_id, FORMATTED)
    stack.write(volume.volume_id, b"data of a pod", pool=pool.name)
    pool.cut.set()
    return await task


async def test_a_clone_cut_after_its_source_was_formatted_is_not_called_half_formatted(stack, pool):
    volume = await stack.create()
    copy = await copy_while_it_is_formatted(
        stack, pool, volume, stack.create("clone", from_volume=volume.volume_id)
    )
    assert stack.read(copy.volume_id, 4, pool=pool.name) == b"data"
    assert (await stack.registry.get_volume(copy.volume_id)).filesystem is None


async def test_a_snapshot_cut_after_its_source_was_formatted_is_not_called_half_formatted(stack, pool):
    volume = await stack.create()
    snapshot = await copy_while_it_is_formatted(stack, pool, volume, stack.snapshot(volume.volume_id))
    restored = await stack.create("restored", from_snapshot=snapshot.snapshot_id)
    assert (await stack.registry.get_snapshot(snapshot.snapshot_id)).filesystem is None
    assert (await stack.registry.get_volume(restored.volume_id)).filesystem is None


async def test_a_snapshot_whose_record_is_of_an_older_release_does_not_pass_it_on(stack, pool):
    volume = await stack.create()
    pool.cut.set()
    snapshot = await stack.snapshot(volume.volume_id)
    stored = await stack.registry.get_snapshot(snapshot.snapshot_id)
    await stack.registry.put_snapshot(replace(stored, filesystem=FORMATTING))
    restored = await stack.create("restored", from_snapshot=snapshot.snapshot_id)
    assert (await stack.registry.get_volume(restored.volume_id)).filesystem is None


async def test_a_copy_is_called_formatted_only_if_its_source_was_before_it_was_cut(stack, pool):
    volume = await stack.create()
    await set_record(stack, volume.volume_id, FORMATTED)
    pool.cut.set()
    clone = await stack.create("clone", from_volume=volume.volume_id)
    assert (await stack.registry.get_volume(clone.volume_id)).filesystem == FORMATTED


@pytest.mark.parametrize("kind", ["volume", "snapshot"])
async def test_a_copy_with_another_file_system_than_its_source_has_is_refused_at_once(stack, pool, kind):
    """And not by every NodeStageVolume for ever, after all its bytes were copied."""
    volume = await stack.create(required=320 * MIB)
    await set_record(stack, volume.volume_id, FORMATTED)
    pool.cut.set()
    source = {"from_volume": volume.volume_id}
    if kind == "snapshot":
        source = {"from_snapshot": (await stack.snapshot(volume.volume_id)).snapshot_id}
    with pytest.raises(InvalidArgument, match="formatted as ext4, not as xfs"):
        await stack.create("copy", required=320 * MIB, capabilities=(mount("xfs"),), **source)
    assert not pool_has(stack, pool, "copy")
    await stack.create("raw", required=320 * MIB, capabilities=(block(),), **source)
    await stack.create("same", required=320 * MIB, capabilities=(mount("ext4"),), **source)


async def test_a_formatted_volume_is_not_confirmed_for_another_file_system(stack, pool):
    volume = await stack.create(required=320 * MIB)
    await set_record(stack, volume.volume_id, FORMATTED)
    request = csi_pb2.ValidateVolumeCapabilitiesRequest(
        volume_id=volume.volume_id, volume_capabilities=[mount("xfs")]
    )
    answer = await stack.controller.ValidateVolumeCapabilities(request, None)
    assert not answer.HasField("confirmed")
    assert "formatted as ext4" in answer.message


def staging(volume):
    """What NodeStageVolume locks."""
    return Keys(frozenset({volume.volume_id}))


@pytest.mark.parametrize("kind", ["clone", "snapshot"])
async def test_a_volume_is_staged_while_a_pool_that_cuts_by_itself_copies_it(stack, pool, kind):
    volume = await stack.create()
    copying = asyncio.create_task(
        stack.create("clone", from_volume=volume.volume_id)
        if kind == "clone"
        else stack.snapshot(volume.volume_id)
    )
    await pool.copying.wait()
    stack.locks.acquire(staging(volume))
    pool.cut.set()
    await copying


def pool_has(stack, pool, name):
    return stack.image(volume_id(name), pool.name).exists()
