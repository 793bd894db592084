"""Copies that take hours, and what goes on beside them."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from csi_vduse.storage.block import Block
from tests.unit.cluster.conftest import until
from tests.unit.cluster.test_shared_pools import server, shared  # noqa: F401 - fixtures
from tests.unit.cluster.test_volumes_in_a_cluster import create_when_known, expand
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


async def test_long_copies_stop_nothing_else_of_their_place(shared, gate):  # noqa: F811
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
