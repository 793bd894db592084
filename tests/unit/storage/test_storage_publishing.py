"""Who has a volume of the storage server, and who is cut off."""

import asyncio
import time

import pytest

from csi_vduse.errors import AlreadyExists, FailedPrecondition
from csi_vduse.storage.model import Format
from tests.unit.storage.nbd_client import WRITE, CutOff, Refused
from tests.unit.storage.use import BLOCK, MIB, SIZE, connect, publish, volume, write


async def test_each_publication_has_its_own_epoch_and_export(server):
    await server.create("v1", SIZE)
    first = await publish(server)
    assert await publish(server) == first
    await server.unpublish("v1", "a")
    second = await publish(server)
    assert (first.epoch, second.epoch) == (1, 2)
    assert first.uri != second.uri
    with pytest.raises(Refused):
        await connect(first.uri)


async def test_what_the_daemon_would_forget_is_to_be_written_through(server, image_format):
    await server.create("v1", SIZE)
    assert (await publish(server)).write_through == (image_format is Format.QCOW2)


async def test_exports_of_a_volume_of_the_same_name_made_anew_are_others(server):
    await server.create("v1", SIZE)
    first = await publish(server)
    await server.unpublish("v1")
    await server.delete(volume("v1"))
    await server.create("v1", SIZE)
    again = await publish(server)
    assert again.epoch == first.epoch
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
    slow = await connect(old.uri.replace(old.export, "x"))
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
