"""A detach that is refused or fails takes nothing away: the volume is served again, or the next call goes on."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.agent.store import Store
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.errors import Pending, VduseError
from tests.unit.agent.test_agent import assert_nothing_left, until
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture
async def agent(node: Node, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))
    made = Agent(node, exit_code=lambda _: -9)
    yield made
    await made.close()


async def test_one_that_is_told_to_come_back_leaves_the_search_for_a_worker_alone(
    agent: Agent, workers: FakeWorkers
):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: "the image is missing" in agent.attachments()[0].state_reason)
    async with agent._volumes.alone("vol-1"):
        with pytest.raises(Pending):
            await agent.detach("vol-1")
        workers.fault = ""
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_it_does_not_wait_for_a_start_that_does_not_end(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    await agent.attach(SPEC)
    workers.fault = "mute"
    workers.processes[0].kill()
    await until(lambda: len(workers.processes) == 2 and agent._volumes.is_busy("vol-1"))
    workers.fault = ""
    async with asyncio.timeout(node.config.step_timeout_s / 2):
        await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_after_one_for_which_there_were_no_descriptors_the_volume_is_served_again(
    agent: Agent, workers: FakeWorkers, monkeypatch: pytest.MonkeyPatch
):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: "the image is missing" in agent.attachments()[0].state_reason)

    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "find", exhausted)
        with pytest.raises(VduseError):
            await agent.detach("vol-1")
    workers.fault = ""
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)
