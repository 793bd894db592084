"""The plan of an agent that starts, as a table; and what comes of carrying it out."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent import recover
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import Attachment, AttachSpec, State
from csi_vduse.agent.recovery import Adopt, Destroy, Finish, Forget, Observed, Report, Step, observe, plan
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.errors import DataLoss, VduseError
from tests.unit.agent.test_agent import until
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)
ATTACHED = Attachment(SPEC, State.ATTACHED)
STRAY = "vol-0123456789abcdef"


@pytest.fixture
async def agent(node: Node) -> AsyncIterator[Agent]:
    made = Agent(node, exit_code=lambda _: None)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))


@pytest.mark.parametrize(
    ("seen", "step"),
    [
        (Observed("vol-1", ATTACHED, exists=True, on_bus=True), Adopt),
        (Observed("vol-1", ATTACHED, exists=True), Adopt),
        (Observed("vol-1", ATTACHED), Forget),
        (Observed("vol-1", ATTACHED, exists=True, on_bus=True, this_boot=False), Forget),
        (Observed("vol-1", replace(ATTACHED, state=State.ATTACHING), exists=True), Finish),
        (Observed("vol-1", replace(ATTACHED, state=State.DETACHING), exists=True, on_bus=True), Finish),
        (Observed("vol-1", replace(ATTACHED, state=State.DETACHING)), Forget),
        (Observed("vol-1", unreadable="of version 9", exists=True, on_bus=True), Report),
        (Observed("vol-1", unreadable="of version 9"), Report),
        (Observed("vol-1"), Forget),
        (Observed(STRAY, exists=True, has_directory=False), Destroy),
        (Observed(STRAY, exists=True, on_bus=True, has_directory=False), Report),
    ],
)
def test_each_thing_that_may_be_left_has_its_step(seen: Observed, step: type[Step]):
    (planned,) = plan([seen])
    assert isinstance(planned, step)
    assert "vol-" in str(planned)


@pytest.mark.parametrize("name", ["theirs", "vol-1", "vol-0123456789ABCDEF"])
def test_what_does_not_have_a_name_of_ours_is_not_even_mentioned(name: str):
    assert plan([Observed(name, exists=True, on_bus=True, has_directory=False)]) == []


async def test_a_device_that_nobody_recorded_is_collected_and_one_in_use_is_not(
    agent: Agent, kernel: FakeKernel, node: Node
):
    for name in (STRAY, "theirs", "vol-00000000000000ff"):
        await kernel.create(DeviceSpec(name=name, capacity_bytes=MIB))
    fd = kernel.open("vol-00000000000000ff")
    await agent.recover()
    os.close(fd)
    assert sorted(kernel.devices) == ["theirs", "vol-00000000000000ff"]
    assert not node.store.names()


async def test_a_record_of_a_later_release_is_refused_and_nothing_of_it_is_touched(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    await agent.attach(SPEC)
    await agent.close()
    record = node.store.directory / "vol-1/record.json"
    text = json.dumps({**json.loads(record.read_text()), "version": 2})
    record.write_text(text)
    older = Agent(node, exit_code=lambda _: None)
    await older.recover()
    assert older.attachments() == []
    assert (record.read_text(), workers.running()) == (text, 1)
    assert kernel.is_open("vol-1")
    with pytest.raises(DataLoss, match="version 1") as caught:
        await older.attach(SPEC)
    assert "another release" in caught.value.hint
    assert record.read_text() == text
    await older.close()


async def test_nothing_of_an_earlier_boot_is_believed(agent: Agent, kernel: FakeKernel, node: Node):
    await kernel.create(DeviceSpec(name="vol-1", capacity_bytes=MIB))
    node.store.save(ATTACHED)
    record = node.store.directory / "vol-1/record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "boot_id": "another"}))
    await agent.recover()
    assert agent.attachments() == []
    assert not node.store.names()
    assert "vol-1" in kernel.devices  # who made it in this boot we do not know


async def test_what_could_not_be_finished_at_the_start_is_tried_again(
    agent: Agent, kernel: FakeKernel, node: Node, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(recover, "COLLECT_PAUSE_S", 0.05)
    monkeypatch.setattr(recover, "_FINISH_AT_ONCE_S", 0.01)
    await kernel.create(DeviceSpec(name="vol-1", capacity_bytes=64 * MIB))
    node.store.save(replace(ATTACHED, state=State.ATTACHING))
    kernel.fail["destroy"] = VduseError("busy")
    await agent.recover()
    assert agent.attachments()[0].state is State.DETACHING
    kernel.fail.clear()
    await until(lambda: not agent.attachments())
    assert kernel.devices == {}


async def test_limits_and_capacity_that_were_recorded_reach_a_worker_that_did_not_hear_of_them(
    agent: Agent, node: Node
):
    attachment = await agent.attach(SPEC)
    await agent.close()
    node.store.save(replace(attachment, spec=replace(attachment.spec, capacity_bytes=128 * MIB)))
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert (await successor.inspect("vol-1")).attachment.spec.capacity_bytes == 128 * MIB
    await successor.detach("vol-1")
    await successor.close()


async def test_to_observe_changes_nothing(agent: Agent, node: Node):
    await agent.attach(SPEC)
    before = observe(node.store, node.sysfs)
    assert [type(step) for step in plan(before)] == [Adopt]
    assert observe(node.store, node.sysfs) == before
    assert await agent.attach(SPEC) == agent.attachments()[0]
