"""A worker that is stopped or stuck is replaced before its device is lost; one that is busy is left alone."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent import watchdog
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State
from csi_vduse.agent.watch import connect
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.served import DRAIN_TIMEOUT_S
from csi_vduse.errors import DeadlineExceeded, Unavailable
from tests.unit.agent.test_agent import until
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture
async def agent(node: Node, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    monkeypatch.setattr(watchdog, "PAUSE_S", 0.05)
    monkeypatch.setattr(watchdog, "ANSWER_TIMEOUT_S", 1.0)
    monkeypatch.setattr(watchdog, "SECOND_TIMEOUT_S", 1.0)
    made = Agent(node, exit_code=lambda _: -9)
    made.watch()
    yield made
    await made.close()


async def test_a_stopped_worker_is_replaced(agent: Agent, workers: FakeWorkers):
    before = await agent.attach(SPEC)
    os.kill(before.worker_pid, signal.SIGSTOP)
    await until(lambda: agent.attachments()[0].worker_pid not in (0, before.worker_pid))
    assert agent.attachments()[0].state is State.ATTACHED
    await until(lambda: workers.running() == 1)


async def test_a_worker_that_stopped_while_somebody_waits_for_it_is_replaced(
    agent: Agent, workers: FakeWorkers
):
    before = await agent.attach(SPEC)
    os.kill(before.worker_pid, signal.SIGSTOP)
    holding = asyncio.ensure_future(agent.quiesce("vol-1", 100.0))
    await until(lambda: agent.attachments()[0].worker_pid not in (0, before.worker_pid))
    with pytest.raises(Unavailable):
        await holding
    await until(lambda: workers.running() == 1)


async def test_a_worker_that_does_not_answer_keeps_nobody_from_asking_another_one(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(
        watchdog, "ANSWER_TIMEOUT_S", 60.0
    )  # for the first; he is asked by now when that changes
    first, second = [await agent.attach(replace(SPEC, volume_id=name)) for name in ("vol-1", "vol-2")]
    os.kill(first.worker_pid, signal.SIGSTOP)
    assert agent._watchdog is not None
    await until(lambda: first.worker_pid in {worker.pid for worker in agent._watchdog._asked})
    await asyncio.sleep(0.2)  # some rounds
    monkeypatch.setattr(watchdog, "ANSWER_TIMEOUT_S", 1.0)
    os.kill(second.worker_pid, signal.SIGSTOP)
    await until(lambda: agent.attachments()[1].worker_pid not in (0, second.worker_pid))
    assert agent.attachments()[0].worker_pid == first.worker_pid
    os.kill(first.worker_pid, signal.SIGCONT)


async def test_a_worker_that_answers_is_left_alone(agent: Agent, workers: FakeWorkers):
    await agent.attach(SPEC)
    await asyncio.sleep(0.5)  # several rounds
    assert len(workers.processes) == 1


def test_what_a_healthy_worker_may_be_busy_with_and_what_the_kernel_waits_leave_room(node: Node):
    longest_s = watchdog.PAUSE_S + watchdog.ANSWER_TIMEOUT_S + watchdog.SECOND_TIMEOUT_S
    assert 2 * DRAIN_TIMEOUT_S < watchdog.ANSWER_TIMEOUT_S
    assert longest_s < node.config.msg_timeout_s - 10


def test_a_worker_that_accepts_nobody_does_not_keep_the_agent_waiting(tmp_path: Path):
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener, contextlib.ExitStack() as waiting:
        listener.bind(path)
        listener.listen(0)
        waiting.enter_context(connect(path)[0])
        with pytest.raises(DeadlineExceeded, match="accepts no connections"):
            connect(path)


_SLEEPER = """
import selectors
with selectors.DefaultSelector() as selector:
    selector.register(0, selectors.EVENT_READ)
    selector.select()
while True:
    pass
"""


async def test_only_a_process_that_sleeps_in_its_selector_is_taken_for_well():
    with subprocess.Popen([sys.executable, "-c", _SLEEPER], stdin=subprocess.PIPE) as process:
        pid = process.pid
        await until(lambda: watchdog.is_waiting(pid))
        process.send_signal(signal.SIGSTOP)
        await until(lambda: not watchdog.is_waiting(pid))
        process.send_signal(signal.SIGCONT)
        await until(lambda: watchdog.is_waiting(pid))
        assert process.stdin is not None
        process.stdin.close()
        await until(lambda: not watchdog.is_waiting(pid))
        process.kill()
    assert not watchdog.is_waiting(pid)
