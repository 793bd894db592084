"""Copies that the storage server makes, of volumes in use too."""

import asyncio
import threading

import pytest

from csi_vduse.errors import AlreadyExists, DeadlineExceeded, NotFound, OutOfRange, Pending, VduseError
from csi_vduse.storage import block as block_layer
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


@pytest.fixture
def gate(server, monkeypatch):
    """Holds copies up in the daemon's stead; `begun` counts those that came so far."""

    class Gate:
        begun = 0
        opened = asyncio.Event()

    copy = server._core.block.copy

    async def gated(*args, **kwargs):
        gate.begun += 1
        await gate.opened.wait()
        await copy(*args, **kwargs)

    gate = Gate()
    gate.opened = asyncio.Event()
    monkeypatch.setattr(server._core.block, "copy", gated)
    return gate


async def begun(gate, count=1):
    async with asyncio.timeout(30):
        while gate.begun < count:
            await asyncio.sleep(0.01)


async def test_who_asks_again_joins_the_copy_and_later_is_told_of_it(server, gate):
    """It waited for it too, but was told another moment, and of any image that had the name."""
    await server.create("v1", SIZE)
    await write(server)
    first = asyncio.create_task(server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60))
    await begun(gate)
    second = asyncio.create_task(server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60))
    first.cancel()  # the caller's end is not the copy's
    await asyncio.sleep(0.1)
    with pytest.raises(Pending, match="v1"):
        await server.copy(snapshot("other"), snapshot("s1"), SIZE, timeout_s=60)
    gate.opened.set()
    cut_ns = await second
    assert await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60) == cut_ns
    assert gate.begun == 1


async def test_an_image_that_is_no_copy_of_the_source_is_not_taken_for_one(server):
    """A clone found an image of its name and was answered, whatever that held."""
    for name in ("v1", "v2", "v3"):
        await server.create(name, SIZE)
    with pytest.raises(AlreadyExists, match="no copy of v1"):
        await server.copy(volume("v1"), volume("v2"), SIZE, timeout_s=60)
    await server.copy(volume("v1"), volume("c1"), SIZE, timeout_s=60)
    with pytest.raises(AlreadyExists, match="no copy of v3"):
        await server.copy(volume("v3"), volume("c1"), SIZE, timeout_s=60)
    with pytest.raises(AlreadyExists, match="a copy of v1"):
        await server.create("c1", SIZE)


async def test_deleting_what_a_copy_makes_ends_the_copy(server, config, gate):
    await server.create("v1", SIZE)
    copying = asyncio.create_task(server.copy(volume("v1"), volume("c1"), SIZE, timeout_s=60))
    waiting = asyncio.create_task(server.copy(volume("v1"), volume("c2"), SIZE, timeout_s=60))
    await begun(gate)
    async with asyncio.timeout(10):
        await server.delete(volume("c2"))
        await server.delete(volume("c1"))
    for ended in (copying, waiting):
        with pytest.raises(Pending, match="deleted"):
            await ended
    await server.delete(volume("v1"))
    assert not list(config.directory.glob("volumes/*"))
    assert server._core.block.nodes == set()


async def test_a_copy_that_the_daemon_is_making_can_be_ended(server, config, monkeypatch):
    """At any point: nothing of it is left in the daemon or on its disk."""
    await server.create("v1", 64 * MIB)
    client = await connect((await publish(server)).uri)
    for at in range(0, 64, 2):
        client.write(at * MIB, bytes([at]) * MIB)
    for delay_s in (0.0, 0.005, 0.02, 0.05):
        copying = asyncio.create_task(server.copy(volume("v1"), volume("c1"), 64 * MIB, timeout_s=60))
        await asyncio.sleep(delay_s)
        await server.delete(volume("c1"))
        await asyncio.gather(copying, return_exceptions=True)
        await server.delete(volume("c1"))
        assert [path.name for path in config.directory.glob("volumes/*")] == ["v1"]
        assert await server._core.block.qmp.execute("query-jobs") == []
        assert server._core.block.nodes == {"v-v1"}


@pytest.mark.parametrize("source", [volume("v1"), snapshot("s1")], ids=["volume", "snapshot"])
async def test_one_source_is_copied_several_times_at_once(server, source):
    """All restores of a snapshot but the first were refused: the daemon mirrors a node once."""
    await server.create("v1", SIZE)
    await write(server)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)
    await asyncio.gather(*(server.copy(source, volume(f"c{n}"), SIZE, timeout_s=60) for n in range(4)))
    for n in range(4):
        assert await content(server, f"c{n}") == BLOCK
    assert server._core.block.nodes == set()


async def test_a_copy_tells_how_far_it_is(server, monkeypatch):
    await server.create("v1", SIZE)
    await write(server)
    seen, execute = [], server._core.block.qmp.execute

    async def looking(command, *args, **kwargs):
        if command == "block-job-cancel":  # all is copied, and the copy is about to be cut
            seen.append(await server.progress(snapshot("s1")))
        return await execute(command, *args, **kwargs)

    monkeypatch.setattr(server._core.block.qmp, "execute", looking)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)
    [(copied, total)] = seen
    assert 0 < copied == total <= SIZE
    assert await server.progress(snapshot("s1")) == (0, 0)


@pytest.fixture
def at_speed(server, monkeypatch):
    """Has the daemon copy so many bytes a second."""

    def slowly(bytes_per_s):
        async def execute(command, arguments=None, **kwargs):
            if command == "blockdev-mirror":
                arguments = {**arguments, "speed": bytes_per_s, "buf-size": MIB // 4}
            return await original(command, arguments, **kwargs)

        original = server._core.block.qmp.execute
        monkeypatch.setattr(server._core.block.qmp, "execute", execute)

    return slowly


async def test_a_copy_that_takes_longer_than_was_reckoned_is_not_given_up_while_it_goes_on(
    server, at_speed, monkeypatch
):
    """It was given up and begun again, for ever on a server that is always that slow."""
    monkeypatch.setattr(block_layer, "_STALL_S", 1.5)
    await server.create("v1", SIZE)
    await write(server, bytes(range(1, 129)) * (4 * MIB // 128))
    at_speed(MIB)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=1)
    assert (await server.status(snapshot("s1"))).allocated_bytes >= 4 * MIB


async def test_a_copy_that_stands_still_is_given_up(server, config, at_speed, monkeypatch):
    monkeypatch.setattr(block_layer, "_STALL_S", 0.5)
    await server.create("v1", SIZE)
    await write(server, bytes(range(1, 129)) * (4 * MIB // 128))
    at_speed(1)
    with pytest.raises(DeadlineExceeded):
        await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=1)
    assert not list(config.directory.glob("snapshots/*"))
