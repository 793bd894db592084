"""A volume changes hands: the new worker serves, or the old one does, whatever fails on the way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent import handover as handover_module
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.dataplane import inflight, versions
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.inflight import InflightLog, LogIdentity
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.dataplane.versions import hello_from_json
from csi_vduse.errors import DataLoss, FailedPrecondition, NotFound, Pending, Unavailable, VduseError
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture
async def agent(node: Node) -> AsyncIterator[Agent]:
    made = Agent(node, exit_code=lambda _: -9)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def serves(agent: Agent) -> int:
    """The process of the one worker that serves vol-1; fails if there is none."""
    inspection = await agent.inspect("vol-1")
    assert inspection.attachment.state is State.ATTACHED
    assert inspection.stats is not None
    return inspection.attachment.worker_pid


async def test_the_new_worker_serves_where_the_old_one_did_and_the_old_one_is_gone(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    before = await agent.attach(SPEC)
    done = await agent.handover("vol-1")
    assert await serves(agent) == done.attachment.worker_pid == workers.processes[1].pid != before.worker_pid
    assert done.attachment.worker_version
    assert 0 < done.pause_s < 10
    await until(lambda: workers.running() == 1)
    assert not node.store.next_control_path("vol-1").exists()
    recorded = node.store.find("vol-1")
    assert recorded is not None
    assert recorded.worker_pid == done.attachment.worker_pid
    await agent.detach("vol-1")
    workers.wait_for_none()
    assert kernel.devices == {}


async def test_the_new_worker_is_found_by_the_next_agent(agent: Agent, node: Node):
    await agent.attach(SPEC)
    done = await agent.handover("vol-1")
    await agent.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert await serves(successor) == done.attachment.worker_pid
    await successor.detach("vol-1")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("refuse", FailedPrecondition),
        ("foreign log", DataLoss),
        ("die", Unavailable),
        ("mute", VduseError),
        ("old log", FailedPrecondition),
    ],
)
async def test_a_new_worker_that_cannot_serve_is_undone_and_the_old_one_goes_on(
    agent: Agent, workers: FakeWorkers, fault: str, error: type[VduseError]
):
    before = await agent.attach(SPEC)
    workers.fault = fault
    with pytest.raises(error):
        await agent.handover("vol-1")
    assert await serves(agent) == before.worker_pid
    await until(lambda: workers.running() == 1)
    workers.fault = ""
    assert (await agent.handover("vol-1")).attachment.worker_pid != before.worker_pid


async def test_what_does_not_drain_is_not_handed_over(agent: Agent, workers: FakeWorkers):
    workers.fault = "slow"
    before = await agent.attach(SPEC)
    with pytest.raises(Unavailable, match="goes on"):
        await agent.handover("vol-1")
    assert await serves(agent) == before.worker_pid


@pytest.mark.parametrize("fault", ["stuck", "ancient"])
async def test_an_old_worker_that_cannot_let_go_is_replaced_as_a_dead_one(
    agent: Agent, workers: FakeWorkers, fault: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(handover_module, "_RELEASE_TIMEOUT_S", 0.2)
    workers.fault = fault
    await agent.attach(SPEC)
    workers.fault = ""
    done = await agent.handover("vol-1")
    assert await serves(agent) == done.attachment.worker_pid
    await until(lambda: workers.running() == 1)


async def test_both_workers_dead_is_a_volume_that_is_revived(agent: Agent, workers: FakeWorkers):
    await agent.attach(SPEC)
    workers.fault = "die"
    old = workers.processes[0]
    handing_over = asyncio.create_task(agent.handover("vol-1"))
    await until(lambda: len(workers.processes) == 2)
    old.kill()
    with pytest.raises(VduseError):
        await handing_over
    workers.fault = ""
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)
    assert await serves(agent) not in (old.pid, 0)


async def test_only_one_operation_at_a_time_and_only_what_is_attached(agent: Agent):
    with pytest.raises(NotFound):
        await agent.handover("vol-1")
    await agent.attach(SPEC)
    first = asyncio.create_task(agent.handover("vol-1"))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Pending):
        await agent.handover("vol-1")
    with pytest.raises(Pending):
        await agent.quiesce("vol-1", 1)
    await first


async def test_a_volume_without_a_worker_cannot_be_handed_over(agent: Agent, workers: FakeWorkers):
    await agent.attach(SPEC)
    workers.fault = "foreign log"
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].state is State.STALLED)
    await until(lambda: "not of this device" in agent.attachments()[0].state_reason)
    with pytest.raises(Unavailable, match="replaced by itself"):
        await agent.handover("vol-1")


async def test_limits_go_with_the_volume(agent: Agent, node: Node):
    await agent.attach(replace(SPEC, throttle=Throttle(iops=10)))
    assert (await agent.handover("vol-1")).attachment.spec.throttle == Throttle(iops=10)


def test_two_releases_talk_if_each_knows_a_protocol_of_the_other():
    ours = versions.hello(started=True)
    assert hello_from_json(ours).can_hand_over
    newer = {**ours, "protocol": versions.PROTOCOL + 5, "something": "new"}
    assert hello_from_json(newer).can_hand_over
    foreign = {**newer, "oldest_protocol": versions.PROTOCOL + 1}
    assert not hello_from_json(foreign).can_hand_over
    assert not hello_from_json({"pid": 1, "started": True}).can_hand_over


def test_a_log_goes_from_a_release_to_the_next_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """N + 1 makes logs of version 2 and still reads those of version 1, which N made and N can take back."""
    identity = LogIdentity("boot", 1, queues=1, queue_size=8)
    inflight.create(tmp_path / "of-n", identity)
    with (tmp_path / "of-n").open("rb+") as file:
        InflightLog(file.fileno(), identity).begin(7)
        with monkeypatch.context() as next_release:
            next_release.setattr(inflight, "VERSION", 2)
            next_release.setattr(inflight, "READABLE", frozenset({1, 2}))
            assert InflightLog(file.fileno(), identity).features == 7
            inflight.create(tmp_path / "of-next", identity)
        assert InflightLog(file.fileno(), identity).features == 7
    with (tmp_path / "of-next").open("rb+") as file, pytest.raises(DataLoss, match="version 2") as caught:
        InflightLog(file.fileno(), identity)
    assert "another release" in caught.value.hint
