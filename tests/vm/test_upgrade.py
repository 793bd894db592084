"""Releases follow one another on a node, forwards and back, while fio writes and verifies."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import csi_vduse
from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, START_TIMEOUT_S, RunningAgent, wait_until, worker_sockets
from tests.vm.test_agent import attach, detach, inspect
from tests.vm.test_recovery import verified_writing, writes

NEXT = "99.0.0"


@dataclass
class Release(RunningAgent):
    """An agent of a release whose package is somewhere else, started beside another one."""

    package_dir: Path = Path()

    def start_beside(self) -> None:
        """Start it to take the place of the agent that runs; returns when it is ready."""
        ready = self.package_dir / "ready"
        ready.unlink(missing_ok=True)
        program = "from csi_vduse.cli.main import main; raise SystemExit(main())"
        argv = [sys.executable, "-c", program, "agent", "--take-over", "--ready-file", str(ready)]
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                [*argv, "--run-dir", str(self.run_dir)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": str(self.package_dir)},
                cwd=self.package_dir,
            )
        wait_until(lambda: self.process.poll() is not None or ready.exists(), "readiness", START_TIMEOUT_S)
        assert self.process.poll() is None, self.log.read_text()


def release(own: RunningAgent, directory: Path, version: str) -> Release:
    """A copy of the package that calls itself another version and uses the run directory of `own`."""
    package = directory / version / "csi_vduse"
    shutil.copytree(Path(csi_vduse.__file__).parent, package, ignore=shutil.ignore_patterns("src"))
    init = package / "__init__.py"
    init.write_text(re.sub(r'__version__ = ".*"', f'__version__ = "{version}"', init.read_text()))
    return Release(own.directory, package_dir=package.parent)


@pytest.fixture
def started() -> Iterator[list[RunningAgent]]:
    agents: list[RunningAgent] = []
    yield agents
    for agent in agents:
        if agent.process.poll() is None:
            agent.stop()


def test_from_a_release_to_the_next_and_back_as_a_surging_daemon_set_does_it(
    own: RunningAgent, image: Path, tmp_path: Path, started: list[RunningAgent]
):
    ours = csi_vduse.__version__
    path = attach(own, image, queues=2).path
    options = (
        "--ioengine=libaio",
        "--iodepth=8",
        "--numjobs=2",
        "--offset_increment=4M",
        "--size=4M",
        "--runtime=3000",
    )
    with verified_writing(path, *options) as fio:
        wait_until(lambda: writes(own) > 50, "writing")
        old: RunningAgent = own
        for version in (NEXT, ours):
            new = release(own, tmp_path, version)
            started.append(new)
            new.start_beside()
            old.disconnect()
            if old is not own:
                assert old.process.poll() is None  # it stays, see docs/upgrade.md
                old.process.terminate()
            assert old.process.wait(120) == 0  # its last worker is gone
            seen = inspect(new).attachment
            assert (seen.state, seen.worker_version) == (agent_pb2.STATE_ATTACHED, version)
            assert new.stub.Probe(agent_pb2.ProbeRequest(), timeout=CALL_TIMEOUT_S).version == version
            assert len(worker_sockets(new)) == 1
            wait_until(lambda agent=new: writes(agent) > 50, "writing")
            assert fio.poll() is None
            old = new
    detach(old)


def test_an_upgrade_in_place_executes_the_spawner_anew_and_hands_all_workers_over(
    own: RunningAgent, image: Path
):
    path = attach(own, image).path
    before = inspect(own).attachment.worker_pid
    with verified_writing(path, "--ioengine=libaio", "--iodepth=8"):
        wait_until(lambda: writes(own) > 50, "writing")
        agent = own.child_pid()
        own.process.send_signal(signal.SIGHUP)
        wait_until(lambda: not Path(f"/proc/{agent}").exists(), "end of the agent")
        own.disconnect()
        own.wait_until_ready()
        assert inspect(own).attachment.worker_pid == before
        argv = ["csi-vduse", "upgrade", "--run-dir", str(own.run_dir), "--output", "json"]
        done = subprocess.run(argv, check=True, capture_output=True, timeout=CALL_TIMEOUT_S)
        (row,) = json.loads(done.stdout)
        assert row["problem"] == ""
        assert inspect(own).attachment.worker_pid not in (0, before)
        wait_until(lambda: writes(own) > 0, "writing")
    detach(own)
