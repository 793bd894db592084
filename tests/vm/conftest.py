"""What the VM suite shares: a running agent, started once, and a look at everything that it may leave behind.

These tests run inside a machine with a VDUSE kernel, as root: `make test-vm`. Python starts in seconds there,
so one `csi-vduse agent` serves all tests that do not need their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import agent_pb2, agent_pb2_grpc
from tests.vm.csi import driver  # noqa: F401 - a fixture

MODULES = ("vduse", "virtio-vdpa", "vhost-vdpa", "loop")  # the last: tests look into images
START_TIMEOUT_S = 300
CALL_TIMEOUT_S = 240
MIB = 1 << 20
PARALLEL = pytest.mark.emulated("queues that run at the same time")
DEBIAN = pytest.mark.emulated("Debian's own kernel")


def wait_until(condition: Callable[[], bool], what: str, timeout_s: float = 60) -> None:
    """Wait for a condition; the emulated machine is slow, so limits are generous."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {timeout_s:g} s"
        time.sleep(0.02)


@dataclass
class RunningAgent:
    """A running `csi-vduse agent`, everything of it below `directory`."""

    directory: Path
    options: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] = field(init=False)
    _channel: grpc.Channel | None = None

    @property
    def run_dir(self) -> Path:
        return self.directory / "run"

    @property
    def log(self) -> Path:
        return self.directory / "agent.log"

    @property
    def stub(self) -> agent_pb2_grpc.AgentStub:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self.run_dir / 'agent.sock'}")
        return agent_pb2_grpc.AgentStub(self._channel)

    def start(self) -> None:
        with self.log.open("ab") as output:
            self.process = subprocess.Popen(
                ["csi-vduse", "agent", *self.options, "--run-dir", str(self.run_dir)],
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.wait_until_ready()

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self.process.poll() is None, self.log.read_text()
            with contextlib.suppress(grpc.RpcError):
                self.stub.Probe(agent_pb2.ProbeRequest(), timeout=10)
                return
            self.disconnect()  # a refused connection would be tried again after growing pauses only
            time.sleep(0.2)
        pytest.fail(f"not ready within {START_TIMEOUT_S} s: {self.log.read_text()}")

    def stop(self) -> int:
        self.disconnect()
        self.process.terminate()
        return self.process.wait(120)

    def disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None

    def child_pid(self) -> int:
        """The agent's own process: the spawner's child that leads no session, as workers do."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        return next(int(child) for child in children if _leads_no_session(int(child)))


def _leads_no_session(pid: int) -> bool:
    try:
        return os.getsid(pid) != pid
    except ProcessLookupError:  # a worker that has ended since
        return False


@pytest.fixture(scope="session", autouse=True)
def kernel() -> None:
    """The modules; a machine without them cannot run this suite, and says so instead of skipping it."""
    if subprocess.run(["modprobe", "--all", *MODULES], check=False, timeout=60).returncode:
        pytest.exit("tests/vm needs a kernel with VDUSE: run `make test-vm`", 1)


@pytest.fixture(scope="session")
def shared_agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    running = RunningAgent(tmp_path_factory.mktemp("agent"))
    running.start()
    yield running
    assert running.stop() == 0, running.log.read_text()


@pytest.fixture
def shared(shared_agent: RunningAgent) -> Iterator[RunningAgent]:
    """The agent that tests share; each leaves no volume behind, and one that fails is cleaned up after."""
    yield shared_agent
    _take_volumes_away(shared_agent)


def _take_volumes_away(agent: RunningAgent) -> None:
    """After a failure: or all later tests find a device that is not theirs."""
    for left in agent.stub.List(agent_pb2.ListRequest(), timeout=CALL_TIMEOUT_S).attachments:
        request = agent_pb2.DetachRequest(volume_id=left.volume_id, force=True)
        agent.stub.Detach(request, timeout=CALL_TIMEOUT_S)


@pytest.fixture
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """An agent of one test's own, which it may stop, kill and start again."""
    running = RunningAgent(tmp_path_factory.mktemp("own"))  # short: sockets are below it
    running.start()
    yield running
    if running.process.poll() is None:
        with contextlib.suppress(grpc.RpcError):
            _take_volumes_away(running)
        running.stop()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A sparse image of 16 MiB."""
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(16 * MIB)
    return path


@dataclass(frozen=True)
class Traces:
    """Everything that an attachment leaves behind if its end is not clean; compare before and after."""

    vduse: frozenset[str]
    vdpa: frozenset[str]
    disks: frozenset[str]
    mounts: frozenset[str]
    files: frozenset[str]
    workers: frozenset[int]
    autoprobe: str


def traces(agent: RunningAgent) -> Traces:
    """What there is now of devices, disks, mounts, files and worker processes."""
    volumes = agent.run_dir / "volumes"
    return Traces(
        vduse=frozenset(path.name for path in Path("/sys/class/vduse").iterdir()),
        vdpa=frozenset(path.name for path in Path("/sys/bus/vdpa/devices").iterdir()),
        disks=frozenset(path.name for path in Path("/sys/block").iterdir() if path.name.startswith("vd")),
        mounts=frozenset(Path("/proc/self/mountinfo").read_text().splitlines()),
        files=frozenset(str(path) for path in volumes.rglob("*")) if volumes.exists() else frozenset(),
        workers=frozenset(worker_sockets(agent)),
        autoprobe=Path("/sys/bus/vdpa/drivers_autoprobe").read_text().strip(),
    )


def worker_sockets(agent: RunningAgent) -> list[int]:
    """Inodes of the control sockets that workers of this agent listen on: one for each living worker."""
    lines = Path("/proc/net/unix").read_text().splitlines()
    ours = [
        line.split()
        for line in lines
        if str(agent.run_dir) in line and line.endswith(("control.sock", "next.sock"))
    ]
    listening = "00010000"  # SO_ACCEPTCON, proc_net_unix(5)
    return sorted(int(fields[6]) for fields in ours if fields[3] == listening)


@contextlib.contextmanager
def leaves_nothing(agent: RunningAgent) -> Iterator[None]:
    """Fail if the body leaves a trace; some go a moment after the call that ends them."""
    before = traces(agent)
    yield
    deadline = time.monotonic() + 30
    while (after := traces(agent)) != before:
        assert time.monotonic() < deadline, f"left behind: before {before}, after {after}"
        time.sleep(0.1)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
