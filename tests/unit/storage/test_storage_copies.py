"""Copies that the storage server makes, of volumes in use too."""

import asyncio
import threading

import pytest

from csi_vduse.errors import NotFound, OutOfRange, Pending, VduseError
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


async def test_a_snapshot_is_independent_of_its_volume(server, config):
    await server.create("v1", SIZE)
    await write(server)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)
    await write(server, bytes(len(BLOCK)))
    await server.delete(volume("v1"))
    await server.copy(snapshot("s1"), volume("v2"), 2 * SIZE, timeout_s=60)
    await server.delete(snapshot("s1"))
    assert await content(server, "v2") == BLOCK
    assert (await server.status(volume("v2"))).image.size_bytes == 2 * SIZE
    check_images(config)


async def test_a_volume_in_use_is_copied_as_it_is_at_one_moment(server):
    """A writer counts up in two places, first and second, while copies are made: no copy has them apart."""
    await server.create("v1", 64 * MIB)
    client = await connect((await publish(server)).uri)
    stop = threading.Event()
    counts = []

    def count():
        number = 0
        while not stop.is_set():
            number += 1
            client.write(0, number.to_bytes(8) * 64)
            client.write(60 * MIB, number.to_bytes(8) * 64)
            counts.append(number)

    writer = asyncio.create_task(asyncio.to_thread(count))
    try:
        for number in range(3):
            before = len(counts)
            await server.copy(volume("v1"), volume(f"c{number}"), 64 * MIB, timeout_s=60)
            first = int.from_bytes((await content(server, f"c{number}", 0))[:8])
            second = int.from_bytes((await content(server, f"c{number}", 60 * MIB))[:8])
            assert first - second in {0, 1}
            assert second >= before
    finally:
        stop.set()
        await writer


async def test_a_copy_takes_no_room_for_what_was_never_written(server, image_format):
    await server.create("v1", 64 * MIB)
    await write(server)
    await server.copy(volume("v1"), snapshot("s1"), 64 * MIB, timeout_s=60)
    assert (await server.status(snapshot("s1"))).allocated_bytes < 2 * MIB


async def test_a_copy_that_takes_too_long_leaves_nothing(server, config):
    await server.create("v1", SIZE)
    with pytest.raises(VduseError):
        await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=-1)
    assert await server.status(snapshot("s1")) is None
    assert not list(config.directory.glob("snapshots/*"))
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)


async def test_a_copy_that_is_being_made_does_not_delay_a_fence(server, monkeypatch):
    await server.create("v1", SIZE)
    old = await connect((await publish(server)).uri)
    old.write(0, BLOCK)
    begun, go_on = asyncio.Event(), asyncio.Event()
    copy = server._core.block.copy

    async def slow(*args, **kwargs):
        begun.set()
        await go_on.wait()
        await copy(*args, **kwargs)

    monkeypatch.setattr(server._core.block, "copy", slow)
    copying = asyncio.create_task(server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60))
    await begun.wait()
    await server.unpublish("v1", "a")
    with pytest.raises(CutOff):
        old.write(0, BLOCK)
    new = await connect((await publish(server, node="b")).uri)
    new.write(MIB, BLOCK)
    for refused in (server.expand("v1", 2 * SIZE), server.delete(volume("v1"))):
        with pytest.raises(Pending):
            await refused
    await server.unpublish("v1")
    with pytest.raises(Pending):
        await server.delete(volume("v1"))
    go_on.set()
    await copying
    await server.delete(volume("v1"))
    await server.copy(snapshot("s1"), volume("v2"), SIZE, timeout_s=60)
    assert await content(server, "v2") == BLOCK
    assert server._core.block.nodes == set()


async def test_copies_of_nothing_and_copies_too_small_are_refused(server):
    await server.create("v1", SIZE)
    with pytest.raises(NotFound):
        await server.copy(volume("no"), snapshot("s1"), SIZE, timeout_s=60)
    with pytest.raises(OutOfRange):
        await server.copy(volume("v1"), volume("v2"), SIZE // 2, timeout_s=60)
