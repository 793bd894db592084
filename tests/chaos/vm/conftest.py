"""An agent for all chaos tests, and a folder on tmpfs for their images; every test ends with nothing left behind."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from lab.paths import CHECKOUT
from tests.chaos.vm import kernel_log
from tests.vm.conftest import RunningAgent, kernel, leaves_nothing, shared, shared_agent

__all__ = ["kernel", "shared", "shared_agent"]

TOOLS = CHECKOUT / ".cache/chaos"


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with a short name, on a tmpfs: sockets and images may be there."""
    path = tmp_path_factory.mktemp("c")
    yield path
    shutil.rmtree(path)


@pytest.fixture
def clean(shared: RunningAgent) -> Iterator[None]:
    """Nothing is left behind, and the kernel has nothing to complain about."""
    with kernel_log.stays_quiet(), leaves_nothing(shared):
        yield


@pytest.fixture(scope="session", autouse=True)
def machine() -> None:
    """Have the kernel name every task that hangs for long, and give the load's jobs, each a session, what nice says."""
    settings = ["kernel.hung_task_warnings=-1", "kernel.sched_autogroup_enabled=0"]
    subprocess.run(["sysctl", "-q", "-e", *settings], check=True, timeout=60)
