from __future__ import annotations

import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.store import Store
from csi_vduse.config import AgentConfig
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path / "kernel")


@pytest.fixture
def workers() -> Iterator[FakeWorkers]:
    source = FakeWorkers()
    yield source
    source.close()


@pytest.fixture
def node(kernel: FakeKernel, workers: FakeWorkers, tmp_path: Path) -> Node:
    config = AgentConfig(run_dir=tmp_path / "run", step_timeout_s=5, max_volumes=3)
    return Node(config, kernel, kernel, kernel.sysfs, workers, Store(config.run_dir / "volumes"))


@pytest.fixture
async def agent(node: Node) -> AsyncIterator[Agent]:
    made = Agent(node, exit_code=lambda _: -9)
    yield made
    await made.close()


@pytest.fixture
def free_disks(monkeypatch: pytest.MonkeyPatch) -> None:
    """No disk has users, so each can be claimed."""
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))
