"""An agent is killed at every step of an operation: the next one finds the volume served, or serves it, or ends it."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.dataplane.backend_spec import FileBackend
from tests.unit.agent.life import Killed, Life
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture
def life(monkeypatch: pytest.MonkeyPatch) -> Life:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))
    made = Life()
    made.install(monkeypatch)
    return made


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


async def handover(agent: Agent) -> None:
    await agent.handover("vol-1")


async def detach(agent: Agent) -> None:
    await agent.detach("vol-1")


async def force_detach(agent: Agent) -> None:
    await agent.detach("vol-1", force=True)


async def resize(agent: Agent) -> None:
    await agent.resize("vol-1", 64 * MIB)


async def _dies_in(
    act: Callable[[Agent], Awaitable[None]], node: Node, life: Life, step: int, *, after: bool
) -> None:
    """Attach, and let the agent be killed at a step of the operation."""
    agent = Agent(node, exit_code=lambda _: None)
    await agent.attach(SPEC)
    life.doom(step, after_the_act=after)
    with pytest.raises(Killed):
        await act(agent)
    await agent.close()
    life.bury()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("act", [handover, resize])
async def test_killed_in_an_operation_on_a_served_volume_one_worker_serves_it(
    act: Callable[[Agent], Awaitable[None]],
    node: Node,
    kernel: FakeKernel,
    workers: FakeWorkers,
    life: Life,
    *,
    after: bool,
):
    counted = Agent(node, exit_code=lambda _: None)
    await counted.attach(SPEC)
    life.doom(None)
    await act(counted)
    steps = list(life.steps)
    await counted.detach("vol-1")
    await counted.close()
    for step in range(len(steps)):
        await _dies_in(act, node, life, step, after=after)
        successor = Agent(node, exit_code=lambda _: None)
        await successor.recover()
        await until(lambda agent=successor: agent.attachments()[0].state is State.ATTACHED)
        await until(lambda: workers.running() == 1)
        assert (await successor.inspect("vol-1")).stats is not None
        await act(successor)
        await successor.detach("vol-1")
        assert kernel.devices == {}
        workers.wait_for_none()
        await successor.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("act", [detach, force_detach])
async def test_killed_in_a_detach_the_next_agent_ends_it_or_serves_the_volume(
    act: Callable[[Agent], Awaitable[None]],
    node: Node,
    kernel: FakeKernel,
    workers: FakeWorkers,
    life: Life,
    *,
    after: bool,
):
    counted = Agent(node, exit_code=lambda _: None)
    await counted.attach(SPEC)
    life.doom(None)
    await act(counted)
    steps = list(life.steps)
    await counted.close()
    for step in range(len(steps)):
        await _dies_in(act, node, life, step, after=after)
        successor = Agent(node, exit_code=lambda _: None)
        await successor.recover()
        await until(lambda agent=successor: all(a.state is State.ATTACHED for a in agent.attachments()))
        if successor.attachments():
            assert (await successor.inspect("vol-1")).stats is not None
            await act(successor)
        assert kernel.devices == {}
        workers.wait_for_none()
        assert not list(node.store.directory.iterdir())
        await successor.close()


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
async def test_killed_in_an_attach_the_next_agent_leaves_nothing_and_can_attach(
    node: Node, kernel: FakeKernel, workers: FakeWorkers, life: Life, *, after: bool
):
    counted = Agent(node, exit_code=lambda _: None)
    life.doom(None)
    await counted.attach(SPEC)
    steps = list(life.steps)
    life.doom(None)
    await counted.detach("vol-1")
    await counted.close()
    for step in range(len(steps)):
        doomed = Agent(node, exit_code=lambda _: None)
        life.doom(step, after_the_act=after)
        with pytest.raises(Killed):
            await doomed.attach(SPEC)
        await doomed.close()
        life.bury()
        successor = Agent(node, exit_code=lambda _: None)
        await successor.recover()
        if successor.attachments():
            assert (steps[step], after) == ("save", True)  # the last record makes it an attachment
        else:
            assert kernel.devices == {}
            workers.wait_for_none()
        assert (await successor.attach(SPEC)).state is State.ATTACHED
        await successor.detach("vol-1")
        await successor.close()
