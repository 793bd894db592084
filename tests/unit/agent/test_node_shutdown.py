"""A node shuts down: what nobody uses is detached, the rest does not hold it up."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, Bus
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.errors import Unavailable
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
DISK = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)
FOR_A_VM = replace(DISK, volume_id="vol-2", bus=Bus.VHOST)


@pytest.fixture
async def agent(node: Node) -> AsyncIterator[Agent]:
    made = Agent(node, exit_code=lambda _: None)
    yield made
    await made.close()


@pytest.fixture(autouse=True)
def _unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))


async def test_what_is_unused_goes_and_what_is_mounted_is_not_waited_for_long(
    agent: Agent, kernel: FakeKernel
):
    await agent.attach(DISK)
    await agent.attach(FOR_A_VM)
    kernel.mount("/mnt/data")
    kept = await agent.shut_down(20)
    assert kept["vol-2"] == ""
    assert "/mnt/data" in kept["vol-1"]
    assert list(kernel.devices) == ["vol-1"]
    assert kernel.devices["vol-1"].attributes["msg_timeout"] == 1
    with pytest.raises(Unavailable, match="shuts down"):
        await agent.attach(FOR_A_VM)


async def test_a_detach_that_hangs_does_not_hold_it_up(agent: Agent, kernel: FakeKernel):
    hangs = asyncio.Event()

    async def hang(*_: object, **__: object) -> None:
        await hangs.wait()

    await agent.attach(DISK)
    kernel.detach = hang  # type: ignore[method-assign]
    kept = await agent.shut_down(0.2)
    assert "too long" in kept["vol-1"]
    assert kernel.devices["vol-1"].attributes["msg_timeout"] == 1
    hangs.set()


async def test_a_shutdown_that_does_not_happen_ends_with_the_agent(
    agent: Agent, kernel: FakeKernel, workers: FakeWorkers, node: Node
):
    await agent.attach(DISK)
    kernel.mount("/mnt/data")
    await agent.shut_down(20)
    await agent.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert kernel.devices["vol-1"].attributes["msg_timeout"] == node.config.msg_timeout_s
    assert workers.running() == 1
    await successor.attach(FOR_A_VM)
    await successor.close()
