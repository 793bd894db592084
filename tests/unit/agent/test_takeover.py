"""A second agent beside the first takes its place: operations end, workers change hands, nobody is left over."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_vduse.agent import takeover
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.agent.place import is_vacant
from csi_vduse.agent.server import start_server
from csi_vduse.agent.takeover import hand_over_workers, only_agent
from csi_vduse.config import AgentConfig
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.errors import FailedPrecondition, Unavailable
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))
    monkeypatch.setattr(takeover, "_ROUND_PAUSE_S", 0.05)


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_an_agent_that_leaves_ends_its_operations_and_takes_no_more(node: Node):
    agent = Agent(node, exit_code=lambda _: None)
    attaching = asyncio.create_task(agent.attach(SPEC))
    await until(agent.attachments)
    await agent.leave()
    assert agent.left.is_set()
    assert (await attaching).state is State.ATTACHED
    for refused in (agent.detach("vol-1"), agent.handover("vol-1"), agent.attach(SPEC)):
        with pytest.raises(Unavailable, match="takes the place"):
            await refused
    await agent.close()


async def test_one_agent_has_the_run_directory_and_another_may_ask_for_it(node: Node):
    config = node.config
    config.run_dir.mkdir(parents=True)
    taking = AgentConfig(run_dir=config.run_dir, take_over=True)

    async def serve_until_left() -> None:
        async with only_agent(config):
            agent = Agent(node, exit_code=lambda _: None)
            server = await start_server(agent, config.socket_path)
            await agent.left.wait()
            await server.stop(1)
            await agent.close()

    old = asyncio.create_task(serve_until_left())
    await until(config.socket_path.exists)
    with pytest.raises(FailedPrecondition, match="another agent"):
        async with only_agent(config):
            pytest.fail("two agents with one run directory")
    async with only_agent(taking):
        await old
        with pytest.raises(Unavailable):
            await AgentClient(config.socket_path).list()


async def test_an_agent_that_does_not_leave_is_not_overtaken(node: Node, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(takeover, "LEAVE_TIMEOUT_S", 0.3)
    node.config.run_dir.mkdir(parents=True)
    async with only_agent(node.config):
        with pytest.raises(FailedPrecondition, match="another agent"):
            async with only_agent(AgentConfig(run_dir=node.config.run_dir, take_over=True)):
                pytest.fail("overtaken")


async def test_whether_an_agent_has_the_run_directory_can_be_seen(node: Node):
    run_dir = node.config.run_dir
    assert not is_vacant(run_dir)  # there is none
    run_dir.mkdir(parents=True)
    assert is_vacant(run_dir)
    async with only_agent(node.config):
        assert not is_vacant(run_dir)
    assert is_vacant(run_dir)


async def test_every_worker_of_another_program_is_handed_over(node: Node, workers: FakeWorkers):
    old = Agent(node, exit_code=lambda _: None)
    await old.attach(SPEC)
    await old.leave()
    await old.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    # The fake worker is a process of its own program; what the successor spawns counts as forked from ours.
    assert successor.workers_of_other_programs() == ["vol-1"]
    assert await hand_over_workers(successor) == []
    assert successor.attachments()[0].worker_pid == workers.processes[1].pid
    await until(lambda: workers.running() == 1)
    await successor.detach("vol-1")
    await successor.close()


async def test_a_broken_device_does_not_keep_the_next_agent_from_being_ready(
    node: Node, workers: FakeWorkers
):
    workers.fault = "broken"
    old = Agent(node, exit_code=lambda _: None)
    await old.attach(SPEC)
    await old.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert await hand_over_workers(successor) == []
    assert successor.attachments()[0].state is State.BROKEN
    assert len(workers.processes) == 1
    await successor.close()


async def test_a_worker_that_cannot_be_handed_over_serves_on_and_is_tried_again(
    node: Node, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
):
    old = Agent(node, exit_code=lambda _: None)
    await old.attach(SPEC)
    await old.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    workers.fault = "refuse"
    with monkeypatch.context() as impatient:
        impatient.setattr(takeover, "HANDOVERS_TIMEOUT_S", 0)
        assert await hand_over_workers(successor) == ["vol-1"]
    trying = asyncio.create_task(hand_over_workers(successor))
    await until(lambda: len(workers.processes) > 3)
    assert successor.attachments()[0].worker_pid == workers.processes[0].pid
    workers.fault = ""
    assert await trying == []
    assert successor.attachments()[0].worker_pid == workers.processes[-1].pid
    await successor.detach("vol-1")
    await successor.close()
