"""Copies that take hours: what goes on beside them, who takes them over, and how they end when nobody wants them."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from csi_vduse.backends import nbd
from csi_vduse.config import PoolConfig
from csi_vduse.kube.resources import SNAPSHOTS, VOLUMES
from csi_vduse.services import copies, node_work, waiting
from csi_vduse.services.server import CsiServer
from csi_vduse.storage.block import Block
from csi_vduse.volumes.ids import snapshot_id, volume_id
from tests.unit.cluster.conftest import until
from tests.unit.cluster.test_volumes_in_a_cluster import create_when_known, expand, failure
from tests.unit.services.stack import MIB

# Of what must not wait for a copy; the copies of these tests wait for the test.
SOON_S = 15.0
REMOTE = {"pool": "remote"}


class Gate:
    """Copies of a storage server, which end when the gate is open."""

    def __init__(self):
        self.begun = 0
        self.open = asyncio.Event()
        self._tasks = []

    def ask(self, call):
        """Have somebody wait for a copy; the waiting may end in vain."""
        self._tasks.append(asyncio.ensure_future(call))
        return self._tasks[-1]

    async def close(self):
        self.open.set()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@pytest.fixture
async def gate(monkeypatch):
    gate = Gate()
    copy = Block.copy

    async def gated(block, *args, **kwargs):
        gate.begun += 1
        await gate.open.wait()
        return await copy(block, *args, **kwargs)

    monkeypatch.setattr(Block, "copy", gated)
    yield gate
    await gate.close()


@asynccontextmanager
async def soon():
    """What is in the body does not wait for a copy."""
    async with asyncio.timeout(SOON_S):
        yield


async def test_long_copies_stop_nothing_else_of_their_place(shared, gate):
    """Four held all workers of the leading controller: nothing was made, grown or deleted in any shared pool."""
    sources = [await create_when_known(shared, f"v{n}", parameters=REMOTE) for n in range(6)]
    clones = [
        gate.ask(shared.create(f"c{n}", parameters=REMOTE, from_volume=source.volume_id))
        for n, source in enumerate(sources)
    ]
    await until(lambda: gate.begun == len(sources))
    async with soon():
        other = await shared.create("other", parameters=REMOTE)
        await expand(shared, other.volume_id, 8 * MIB)
        await shared.delete(other.volume_id)
    assert not any(clone.done() for clone in clones)
    gate.open.set()
    await asyncio.gather(*clones)


async def test_copies_of_one_volume_wait_for_each_other_and_nobody_for_them(shared, gate, monkeypatch):
    monkeypatch.setattr(copies, "_REMOTE_SLOTS", 2)
    template = await create_when_known(shared, "v", parameters=REMOTE)
    other = await shared.create("w", parameters=REMOTE)
    clones = [
        gate.ask(shared.create(f"c{n}", parameters=REMOTE, from_volume=template.volume_id)) for n in range(3)
    ]
    paths = [VOLUMES.named(volume_id(f"c{n}")) for n in range(3)]
    await until(lambda: all((shared.server.object(path) or {}).get("status") for path in paths))
    snapshot = gate.ask(shared.snapshot(other.volume_id))
    async with soon():
        await until(lambda: gate.begun == 2)
    gate.open.set()
    await asyncio.gather(*clones, snapshot)


async def test_an_object_that_is_deleted_while_it_is_being_copied_ends_its_copy(shared, server, gate):
    source = await create_when_known(shared, "v", parameters=REMOTE)
    gate.ask(shared.create("c", parameters=REMOTE, from_volume=source.volume_id))
    await until(lambda: gate.begun)
    async with soon():
        await shared.api.delete(VOLUMES, volume_id("c"))
        await until(lambda: shared.server.object(VOLUMES.named(volume_id("c"))) is None)
        await shared.delete(source.volume_id)
    assert await server.volumes() == []


@pytest.mark.parametrize("is_finished", [False, True], ids=["under way", "finished"])
async def test_the_next_leader_goes_on_with_the_copy_of_the_one_before(
    shared, server, gate, is_finished, monkeypatch
):
    """It threw it away and began again, for ever if copies take longer than leaders last."""
    monkeypatch.setattr(CsiServer.stop, "__defaults__", (0.1,))
    source = await create_when_known(shared, "v", parameters=REMOTE)
    cut = await create_when_known(shared, "w", parameters=REMOTE)
    gate.ask(shared.create("c", parameters=REMOTE, from_volume=source.volume_id))
    gate.ask(shared.snapshot(cut.volume_id))
    await until(lambda: gate.begun == 2)
    await shared.stop("controller")
    if is_finished:
        gate.open.set()
        await until(lambda: not server._copies._jobs)
    await shared.start_controller(
        pools=(PoolConfig("remote", "nbd", f"unix:{server._core.config.control.path}"),)
    )
    clone = gate.ask(create_when_known(shared, "c", parameters=REMOTE, from_volume=source.volume_id))
    snapshot = gate.ask(shared.snapshot(cut.volume_id))
    await asyncio.sleep(1.0)  # the new leader sees what is wanted
    gate.open.set()
    async with soon():
        assert (await clone).content_source.volume.volume_id == source.volume_id
        assert (await snapshot).ready_to_use
    assert gate.begun == 2


async def test_the_object_says_how_far_its_copy_is_until_it_is_made(shared, gate, monkeypatch):
    async def progress(_block, _target):
        return MIB, 4 * MIB

    monkeypatch.setattr(Block, "progress", progress)
    monkeypatch.setattr(nbd, "_WATCH_PERIOD_S", 0.05)
    monkeypatch.setattr(node_work, "_PROGRESS_PERIOD_S", 0.05)
    source = await create_when_known(shared, "v", parameters=REMOTE)
    clone = gate.ask(shared.create("c", parameters=REMOTE, from_volume=source.volume_id))
    snapshot = gate.ask(shared.snapshot((await shared.create("w", parameters=REMOTE)).volume_id))
    paths = [VOLUMES.named(volume_id("c")), SNAPSHOTS.named(snapshot_id("s"))]
    told = {"copied": "25%", "copiedBytes": MIB, "totalBytes": 4 * MIB}
    for path in paths:
        await until(lambda path=path: told.items() <= shared.server.object(path).get("status", {}).items())
    another = await shared.create("x", parameters=REMOTE)
    monkeypatch.setattr(waiting, "WAIT_S", 1.0)
    impatient = shared.create("d", parameters=REMOTE, from_volume=another.volume_id)
    assert "25% is copied" in (await failure(impatient)).details()
    gate.open.set()
    await asyncio.gather(clone, snapshot)
    for path in paths:
        assert not told.keys() & shared.server.object(path)["status"].keys()
