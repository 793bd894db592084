"""A detach that is refused or fails takes nothing away: the volume is served again, or the next call goes on."""

from __future__ import annotations

import asyncio
import errno
import time
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent import recover
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.agent.store import Store
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.errors import DeadlineExceeded, Pending, VduseError
from tests.unit.agent.test_agent import assert_nothing_left, until
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("free_disks")
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


async def _exhausted(*_: object) -> None:
    raise OSError(errno.EMFILE, "Too many open files")


async def _attached_without_a_worker(agent: Agent, workers: FakeWorkers) -> None:
    """Have a volume whose worker died and whose search for another one is refused."""
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: "the image is missing" in agent.attachments()[0].state_reason)


async def test_one_that_is_told_to_come_back_leaves_the_search_for_a_worker_alone(
    agent: Agent, workers: FakeWorkers
):
    await _attached_without_a_worker(agent, workers)
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
    await _attached_without_a_worker(agent, workers)

    def exhausted(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(Store, "find", exhausted)
        with pytest.raises(VduseError):
            await agent.detach("vol-1")
    workers.fault = ""
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_what_a_failed_attach_left_is_removed_by_the_next_attach(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    """kubelet asks for no detach of what it has never seen attached."""
    kernel.fail = {"bus attach": VduseError("no"), "destroy": VduseError("busy")}
    with pytest.raises(VduseError):
        await agent.attach(SPEC)
    kernel.fail = {"destroy": VduseError("still busy")}
    with pytest.raises(VduseError, match="still busy"):
        await agent.attach(SPEC)
    assert [each.state for each in agent.attachments()] == [State.DETACHING]
    kernel.fail.clear()
    assert (await agent.attach(replace(SPEC, read_only=True))).spec.read_only
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_one_that_failed_in_the_middle_is_finished_by_an_attach(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    before = await agent.attach(SPEC)
    kernel.fail["bus detach"] = DeadlineExceeded("stuck")
    for operation in (agent.detach("vol-1"), agent.attach(SPEC)):
        with pytest.raises(DeadlineExceeded, match="stuck"):
            await operation
    kernel.fail.clear()
    after = await agent.attach(SPEC)
    assert (after.state, after.worker_pid != before.worker_pid) == (State.ATTACHED, True)
    assert kernel.steps.count("create") == 2
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


@pytest.mark.parametrize("force", [False, True])
async def test_an_unbind_whose_worker_died_gets_another_worker(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node, *, force: bool
):
    """It looks unbound: the link `driver` goes before the reset that waits for the worker."""
    await agent.attach(SPEC)
    kernel.fail["bus detach"] = DeadlineExceeded("stuck")
    with pytest.raises(DeadlineExceeded):
        await agent.detach("vol-1", force=force)
    (kernel.on_bus("vol-1") / "driver").unlink()
    for process in workers.processes:
        process.kill()
    await until(lambda: agent.attachments()[0].worker_pid == 0)
    kernel.fail.clear()
    await agent.detach("vol-1")  # the fake kernel fails the test if nobody serves
    assert_nothing_left(kernel, workers, node)


async def test_a_volume_whose_worker_cannot_be_found_at_first_is_served_again_when_that_dies(
    agent: Agent, workers: FakeWorkers, node: Node, monkeypatch: pytest.MonkeyPatch
):
    await agent.attach(SPEC)
    await agent.close()
    successor = Agent(node, exit_code=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr("csi_vduse.agent.attachments.find_serving", _exhausted)
        await successor.recover()
    workers.processes[0].kill()
    await until(lambda: successor.attachments()[0].state is State.ATTACHED)
    await successor.detach("vol-1")
    await successor.close()


async def test_one_that_an_earlier_agent_left_is_collected_although_its_worker_cannot_be_found_at_first(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node, monkeypatch: pytest.MonkeyPatch
):
    await agent.attach(SPEC)
    kernel.fail["bus detach"] = DeadlineExceeded("stuck")
    with pytest.raises(DeadlineExceeded):
        await agent.detach("vol-1")
    await agent.close()
    monkeypatch.setattr(recover, "COLLECT_PAUSE_S", 0.05)
    monkeypatch.setattr(recover, "_FINISH_AT_ONCE_S", 0.01)
    successor = Agent(node, exit_code=lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr("csi_vduse.agent.attachments.find_serving", _exhausted)
        await successor.recover()
    kernel.fail["bus detach"] = OSError(errno.EMFILE, "Too many open files")
    await asyncio.sleep(0.3)  # some rounds
    workers.processes[0].kill()  # as the record stands it has no worker that we know
    kernel.fail.clear()
    await until(lambda: successor.attachments() == [])
    assert_nothing_left(kernel, workers, node)
    await successor.close()


async def test_a_look_into_many_processes_keeps_nobody_else_waiting(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
):
    """It was done in the event loop: meanwhile no worker that died was replaced, and none was watched."""
    await agent.attach(SPEC)
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.openers", lambda *_: time.sleep(0.5) or [])
    longest_s, last_s = 0.0, time.monotonic()
    detaching = asyncio.ensure_future(agent.detach("vol-1"))
    while not detaching.done():
        await asyncio.sleep(0.01)
        now_s = time.monotonic()
        longest_s, last_s = max(longest_s, now_s - last_s), now_s
    await detaching
    assert longest_s < 0.4
