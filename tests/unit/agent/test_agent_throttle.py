"""When a worker hears of limits: never while the kernel adds or removes its disk, and whenever they change."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec
from csi_vduse.agent.workers import Worker
from csi_vduse.dataplane import channel
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import FailedPrecondition, NotFound, Pending
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 << 20, queues=2, throttle=Throttle(7))


@pytest.fixture
async def agent(node: Node, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    """An agent whose workers' limits are among the kernel's steps: "limit 7", or "limit 0" for none."""
    real_call = Worker.call

    async def call(
        worker: Worker, message: channel.Message, fds: Sequence[int] = (), *, timeout_s: float
    ) -> channel.Message:
        if "throttle" in message:
            kernel.steps.append(f"limit {message['throttle']['iops']}")
        return await real_call(worker, message, fds, timeout_s=timeout_s)

    monkeypatch.setattr(Worker, "call", call)
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: socket.socket().detach())
    made = Agent(node, exit_code=lambda _: None)
    yield made
    await made.close()


def told(kernel: FakeKernel) -> list[str]:
    return [step for step in kernel.steps if step.startswith(("limit", "bus"))]


async def test_limits_begin_after_the_bus_and_end_before_it(agent: Agent, kernel: FakeKernel):
    await agent.attach(SPEC)
    assert told(kernel) == ["limit 0", "bus attach", "limit 7"]
    kernel.steps.clear()
    await agent.detach("vol-1")
    assert told(kernel) == ["limit 0", "bus detach"]


async def test_limits_end_before_anybody_who_has_the_disk_open_is_waited_for(
    agent: Agent, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
):
    """It may be udev, which reads, and would not come to an end."""
    await agent.attach(SPEC)
    kernel.steps.clear()
    openers = iter([["5 (dd)"], []])

    def look(*_: object) -> list[str]:
        kernel.steps.append("bus: is anybody there?")
        return next(openers)

    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.openers", look)
    await agent.detach("vol-1")
    assert told(kernel) == ["limit 0", *["bus: is anybody there?"] * 2, "bus detach"]


async def test_limits_are_back_when_the_disk_is_in_use(
    agent: Agent, kernel: FakeKernel, monkeypatch: pytest.MonkeyPatch
):
    await agent.attach(SPEC)
    kernel.steps.clear()
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.openers", lambda *_: ["5 (dd)"])
    monkeypatch.setattr("csi_vduse.agent.detach._OPENERS_GRACE_S", 0.1)
    with pytest.raises(FailedPrecondition, match="dd"):
        await agent.detach("vol-1")
    assert told(kernel) == ["limit 0", "limit 7"]


async def test_a_worker_that_dies_meanwhile_does_not_hide_why_a_disk_stays(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
):
    """It cannot be told of its limits again; the next one is, by what is recorded."""
    attachment = await agent.attach(SPEC)

    def look(*_: object) -> list[str]:
        os.kill(attachment.worker_pid, signal.SIGKILL)
        return ["5 (dd)"]

    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.openers", look)
    monkeypatch.setattr("csi_vduse.agent.detach._OPENERS_GRACE_S", -1.0)
    with pytest.raises(FailedPrecondition, match="dd"):
        await agent.detach("vol-1")
    assert agent.attachments()[0].spec.throttle == Throttle(7)


@pytest.mark.parametrize("name", ["(udev-worker)", "systemd-udevd", "udevd"])
async def test_udev_is_waited_for_longer_than_others(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, name: str
):
    """It goes by itself, and nobody can be told to end it."""
    await agent.attach(SPEC)
    until = time.monotonic() + 0.5
    monkeypatch.setattr(
        "csi_vduse.vdpa.sysfs.Sysfs.openers",
        lambda *_: [f"5 ({name})"] if time.monotonic() < until else [],
    )
    monkeypatch.setattr("csi_vduse.agent.detach._OPENERS_GRACE_S", 0.1)
    await agent.detach("vol-1")


async def test_limits_are_back_when_a_detach_fails(agent: Agent, kernel: FakeKernel):
    await agent.attach(SPEC)
    kernel.steps.clear()
    kernel.fail["bus detach"] = FailedPrecondition("in use")
    with pytest.raises(FailedPrecondition):
        await agent.detach("vol-1")
    assert told(kernel) == ["limit 0", "bus detach", "limit 7"]


async def test_without_limits_nobody_is_told(agent: Agent, kernel: FakeKernel):
    await agent.attach(replace(SPEC, throttle=Throttle()))
    await agent.detach("vol-1")
    assert told(kernel) == ["limit 0", "bus attach", "bus detach"]


async def test_a_dead_workers_limits_are_recorded_and_its_successors(
    agent: Agent, kernel: FakeKernel, node: Node, workers: FakeWorkers
):
    attachment = await agent.attach(SPEC)
    workers.fault = "refuse"
    os.kill(attachment.worker_pid, signal.SIGKILL)
    while agent.attachments()[0].worker_pid:
        await asyncio.sleep(0.01)
    while True:
        try:
            assert (await agent.throttle("vol-1", Throttle(9))).spec.throttle == Throttle(9)
            break
        except Pending:  # a successor is just being tried
            await asyncio.sleep(0.01)
    found = node.store.find("vol-1")
    assert found is not None
    assert found.spec.throttle == Throttle(9)
    workers.fault = ""
    while not agent.attachments()[0].worker_pid:
        await asyncio.sleep(0.01)
    assert told(kernel)[-1] == "limit 9"


async def test_a_new_agent_tells_the_worker_what_is_recorded(agent: Agent, kernel: FakeKernel, node: Node):
    await agent.attach(SPEC)
    await agent.close()
    kernel.steps.clear()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert told(kernel) == ["limit 7"]
    await successor.close()


async def test_limits_of_what_is_not_attached_are_refused(agent: Agent):
    with pytest.raises(NotFound, match="vol-2"):
        await agent.throttle("vol-2", Throttle(1))
