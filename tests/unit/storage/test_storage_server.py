"""The storage server against a real qemu-storage-daemon: content by NBD, fences, restarts, whole images."""

import asyncio
import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from csi_vduse.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Pending,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from csi_vduse.storage.model import Format, Key, Kind
from tests.unit.storage.conftest import started
from tests.unit.storage.nbd_client import WRITE, CutOff, NbdClient, Refused

MIB = 1 << 20
SIZE = 8 * MIB
BLOCK = bytes(range(256)) * 16


def volume(name):
    return Key(Kind.VOLUME, name)


def snapshot(name):
    return Key(Kind.SNAPSHOT, name)


_clients = []


@pytest.fixture(autouse=True)
def _clients_are_closed():
    yield
    while _clients:
        _clients.pop().close()


async def connect(uri):
    _clients.append(await asyncio.to_thread(NbdClient, uri))
    return _clients[-1]


async def publish(server, name="v1", node="a", **manner):
    return await server.publish(name, node, **{"read_only": False, "shared": False, **manner})


async def write(server, data=BLOCK, at=MIB, name="v1", node="a"):
    """Write a block through a node's export and take the volume back from it."""
    client = await connect((await publish(server, name, node)).uri)
    client.write(at, data)
    client.flush()
    client.close()
    await server.unpublish(name, node)


async def content(server, name, at=MIB, length=4096):
    client = await connect((await publish(server, name, "reader")).uri)
    try:
        return client.read(at, length)
    finally:
        client.close()
        await server.unpublish(name, "reader")


def check_images(config):
    """qemu-img finds nothing wrong with any image."""
    for path in config.directory.glob("*/*/image.qcow2"):
        subprocess.run(["qemu-img", "check", "-q", str(path)], check=True, timeout=60)


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


async def test_each_publication_has_its_own_epoch_and_export(server):
    await server.create("v1", SIZE)
    first = await publish(server)
    assert await publish(server) == first
    await server.unpublish("v1", "a")
    second = await publish(server)
    assert (first.publication.epoch, second.publication.epoch) == (1, 2)
    assert first.uri != second.uri
    with pytest.raises(Refused):
        await connect(first.uri)


async def test_exports_of_a_volume_of_the_same_name_made_anew_are_others(server):
    await server.create("v1", SIZE)
    first = await publish(server)
    await server.unpublish("v1")
    await server.delete(volume("v1"))
    await server.create("v1", SIZE)
    again = await publish(server)
    assert again.publication.epoch == first.publication.epoch
    assert again.uri != first.uri


async def test_a_node_that_lost_the_volume_is_cut_off_and_cannot_come_back(server):
    await server.create("v1", SIZE)
    old = await publish(server, node="a")
    client = await connect(old.uri)
    client.write(0, BLOCK)
    await server.unpublish("v1", "a")
    new = await publish(server, node="b")
    with pytest.raises(CutOff):
        client.write(0, bytes(len(BLOCK)))
    with pytest.raises(Refused):
        await connect(old.uri)
    reader = await connect(new.uri)
    assert reader.read(0, len(BLOCK)) == BLOCK
    reader.close()


async def test_unpublish_returns_when_requests_in_flight_are_done(server):
    """The disk is slow: what the node had sent is written before, never after, unpublish returns."""
    await server.create("v1", SIZE)
    old = await publish(server, node="a")
    client = await connect(old.uri)
    block = server._core.block
    group = {"qom-type": "throttle-group", "id": "slow", "x-iops-write": 1, "x-iops-write-max": 1}
    await block.qmp.execute("object-add", group)
    await block.qmp.execute(
        "blockdev-add",
        {"driver": "throttle", "node-name": "slow", "throttle-group": "slow", "file": "v-v1"},
    )
    export = {"type": "nbd", "id": "x", "name": "x", "node-name": "slow", "writable": True}
    await block.qmp.execute("block-export-add", export)
    slow = await connect(old.uri.replace(old.publication.export, "x"))
    for number in range(4):
        slow.submit(WRITE, number * len(BLOCK), len(BLOCK), BLOCK)
    client.flush()
    begun_s = time.monotonic()
    await block.remove_export("x")
    assert time.monotonic() - begun_s > 0.5, "nothing was in flight: the test proves nothing"
    first = client.read(0, 4 * len(BLOCK))
    await asyncio.sleep(1.5)  # what would come late would come by now: one request in a second
    assert client.read(0, 4 * len(BLOCK)) == first
    client.close()
    await block.close("slow")


async def test_one_node_at_a_time_writes(server):
    await server.create("v1", SIZE)
    await publish(server, node="a")
    for manner in ({}, {"shared": True}, {"read_only": True}):
        with pytest.raises(FailedPrecondition, match="published at a"):
            await publish(server, node="b", **manner)
    with pytest.raises(AlreadyExists):
        await publish(server, node="a", read_only=True)


async def test_readers_go_together_and_keep_writers_out(server):
    await server.create("v1", SIZE)
    await write(server)
    clients = [await connect((await publish(server, node=node, read_only=True)).uri) for node in "abc"]
    assert all(client.read_only and client.read(MIB, len(BLOCK)) == BLOCK for client in clients)
    with pytest.raises(OSError):
        clients[0].write(0, BLOCK)
    with pytest.raises(FailedPrecondition):
        await publish(server, node="d")


async def test_a_moving_vm_has_its_volume_on_two_nodes_and_not_on_three(server):
    await server.create("v1", SIZE)
    source = await connect((await publish(server, node="a", shared=True)).uri)
    target = await connect((await publish(server, node="b", shared=True)).uri)
    source.write(MIB, BLOCK)
    assert target.read(MIB, len(BLOCK)) == BLOCK
    with pytest.raises(FailedPrecondition, match="2 nodes at most"):
        await publish(server, node="c", shared=True)
    await server.unpublish("v1", "a")
    target.write(0, BLOCK)
    with pytest.raises(CutOff):
        source.write(0, BLOCK)


async def test_a_published_volume_is_not_deleted(server):
    await server.create("v1", SIZE)
    await publish(server)
    with pytest.raises(FailedPrecondition, match="published at a"):
        await server.delete(volume("v1"))
    await server.unpublish("v1")
    await server.delete(volume("v1"))


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


async def until_served(server, old_pid):
    """Wait for another daemon than `old_pid` that has its exports."""
    async with asyncio.timeout(120):
        while server.daemon_pid in {0, old_pid}:
            await asyncio.sleep(0.05)


async def test_a_killed_daemon_comes_back_with_the_same_exports(server, config):
    await server.create("v1", SIZE)
    await server.create("v2", SIZE)
    gone = await publish(server, "v2", "b")
    await server.unpublish("v2", "b")
    published = await publish(server)
    client = await connect(published.uri)
    client.write(MIB, BLOCK)
    client.flush()
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    await until_served(server, pid)
    assert await publish(server) == published
    back = await connect(published.uri)
    assert back.read(MIB, len(BLOCK)) == BLOCK
    back.write(2 * MIB, BLOCK)
    back.close()
    with pytest.raises(Refused):
        await connect(gone.uri)
    await server.unpublish("v1")
    check_images(config)


async def test_calls_while_the_daemon_is_away_are_unavailable_at_once(server):
    await server.create("v1", SIZE)
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    await server._core.block.qmp.gone.wait()
    begun_s = time.monotonic()
    with pytest.raises(Unavailable):
        await publish(server)
    assert time.monotonic() - begun_s < 5
    await until_served(server, pid)
    await publish(server)


async def test_a_storage_server_that_was_killed_finds_its_daemon_serving(config):
    """The first server is let go of as a kill would: without a word to the daemon."""
    first = running = started(config)
    server = await running.__aenter__()
    await server.create("v1", SIZE)
    await server.create("v2", SIZE)
    published = await publish(server)
    stale = await publish(server, "v2", "b")
    client = await connect(published.uri)
    client.write(MIB, BLOCK)
    pid = server.daemon_pid
    await _abandon(server)
    # Killed between the record and the act: the export is there, its publication has been taken back.
    image = server._core.store.find(volume("v2"))
    server._core.store.save(type(image)(image.key, image.format, image.size_bytes, image.epoch))
    async with started(config) as second:
        assert second.daemon_pid == pid
        assert client.read(MIB, len(BLOCK)) == BLOCK, "the client was cut off"
        with pytest.raises(Refused):
            await connect(stale.uri)
        assert await publish(second) == published
        await second.unpublish("v1")
    del first


async def _abandon(server):
    server._daemon._supervision.cancel()
    await server._daemon._qmp.close()
    os.close(next(fd for fd in _lock_fds(server)))


def _lock_fds(server):
    path = str(server._core.config.directory / ".lock")
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(link.readlink()) == path:
                yield int(link.name)


async def test_a_daemon_with_other_options_is_replaced(config, tmp_path):
    running = started(config)
    server = await running.__aenter__()
    await server.create("v1", SIZE)
    await publish(server)
    pid = server.daemon_pid
    await _abandon(server)
    moved = type(config)(**{**vars(config), "nbd": type(config.nbd)(path=tmp_path / "other.sock")})
    async with started(moved) as second:
        assert second.daemon_pid != pid
        client = await connect((await publish(second)).uri)
        assert client.size_bytes == SIZE
        client.close()


async def test_a_directory_has_one_storage_server(server, config):
    with pytest.raises(FailedPrecondition, match="another storage server"):
        async with started(config):
            pass


async def test_a_missing_directory_is_not_made(config):
    config.directory.rmdir()
    with pytest.raises(FailedPrecondition, match="not a directory"):
        async with started(config):
            pass
    assert not config.directory.exists()


async def test_an_image_that_is_damaged_does_not_keep_others_away(config):
    async with started(config) as server:
        for name in ("v1", "v2"):
            await server.create(name, SIZE)
            await publish(server, name)
    image = next(config.directory.glob("volumes/v1/image.*"))
    image.rename(image.with_name("elsewhere"))
    async with started(config) as server:
        (await connect((await publish(server, "v2")).uri)).close()
        with pytest.raises(DataLoss):
            await publish(server, "v1")
        image.with_name("elsewhere").rename(image)
        (await connect((await publish(server, "v1")).uri)).close()


async def test_what_interrupted_calls_left_is_removed_at_start(config):
    left = config.directory / "volumes/v1.0123.tmp"
    left.mkdir(parents=True)
    (left / "image.raw").touch()
    async with started(config) as server:
        assert not left.exists()
        assert [image.key.id for image in await server.volumes()] == []


@pytest.mark.parametrize("image_format", [Format.RAW], indirect=True)
async def test_usage_counts_snapshots(server):
    await server.create("v1", SIZE)
    await write(server)
    await server.copy(volume("v1"), snapshot("s1"), SIZE, timeout_s=60)
    total, foreign, snapshots = await server.usage()
    assert total > foreign >= 0
    assert 4096 <= snapshots < MIB
