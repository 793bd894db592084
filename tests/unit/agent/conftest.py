from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

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
