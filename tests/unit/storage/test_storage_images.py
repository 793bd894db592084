"""The storage server against a real qemu-storage-daemon: images made, grown, removed, and whole."""

import pytest

from csi_vduse.errors import InvalidArgument, ResourceExhausted
from csi_vduse.storage.model import Format
from tests.unit.storage.nbd_client import CutOff
from tests.unit.storage.use import (
    BLOCK,
    MIB,
    SIZE,
    check_images,
    connect,
    content,
    publish,
    snapshot,
    volume,
    write,
)


async def test_a_new_volume_reads_as_zeros_and_keeps_what_a_node_wrote(server, config):
    await server.create("v1", SIZE)
    assert await content(server, "v1") == bytes(len(BLOCK))
    await write(server)
    assert await content(server, "v1") == BLOCK
    check_images(config)


async def test_create_and_delete_may_be_repeated(server, config):
    await server.create("v1", SIZE)
    await write(server)
    await server.create("v1", SIZE)
    assert await content(server, "v1") == BLOCK
    await server.delete(volume("v1"))
    await server.delete(volume("v1"))
    assert await server.status(volume("v1")) is None
    assert not list(config.directory.glob("volumes/*"))


async def test_status_tells_size_and_what_is_wrong(server, config):
    await server.create("v1", SIZE)
    status = await server.status(volume("v1"))
    assert (status.image.size_bytes, status.problem) == (SIZE, "")
    next(config.directory.glob("volumes/v1/image.*")).unlink()
    assert "missing" in (await server.status(volume("v1"))).problem


async def test_ids_that_are_paths_are_refused(server):
    for hostile in ("../x", "a/b", "", "A", "x" * 64, "-x"):
        with pytest.raises(InvalidArgument):
            await server.create(hostile, SIZE)


async def test_a_volume_grows_while_it_is_used(server, config):
    await server.create("v1", SIZE)
    published = await publish(server)
    client = await connect(published.uri)
    client.write(0, BLOCK)
    await server.expand("v1", 2 * SIZE)
    await server.expand("v1", 2 * SIZE)
    with pytest.raises(CutOff):
        client.read(0, 512)
    back = await connect(published.uri)
    assert back.size_bytes == 2 * SIZE
    assert back.read(0, len(BLOCK)) == BLOCK
    assert back.read(2 * SIZE - 512, 512) == bytes(512)
    back.close()
    await server.expand("v1", SIZE)
    assert (await server.status(volume("v1"))).image.size_bytes == 2 * SIZE
    await server.unpublish("v1")
    await server.expand("v1", 3 * SIZE)
    assert (await server.status(volume("v1"))).image.size_bytes == 3 * SIZE
    check_images(config)


async def test_a_volume_that_could_not_grow_is_served_as_before(server, monkeypatch):
    await server.create("v1", SIZE)
    published = await publish(server)

    async def fails(*_args):
        raise ResourceExhausted("full")

    monkeypatch.setattr(server._core.block, "resize", fails)
    with pytest.raises(ResourceExhausted):
        await server.expand("v1", 2 * SIZE)
    assert (await connect(published.uri)).size_bytes == SIZE


@pytest.mark.parametrize("image_format", [Format.RAW], indirect=True)
async def test_usage_counts_snapshots(server):
    await server.create("v1", SIZE)
    await write(server)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)
    total, foreign, snapshots = await server.usage()
    assert total > foreign >= 0
    assert 4096 <= snapshots < MIB
