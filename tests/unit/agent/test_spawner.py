"""The first process: keeps the agent running, forks clean workers, ends without them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.unit.processes import is_alive

# The agent writes "agent PID", spawns a worker, and writes "worker PID"; the worker writes its descriptors.
PROGRAM = """
import os, socket, sys, time
from pathlib import Path
from csi_vduse.agent import spawner
from csi_vduse.dataplane import channel

out = Path(sys.argv[1])

def note(line):
    with out.open("a") as file:
        file.write(line + "\\n")

def agent(sock):
    note(f"agent {os.getpid()}")
    if sys.argv[2] == "fail" or (sys.argv[2] == "fail-later" and out.read_text().count("agent") == 2):
        return 3
    channel.send(sock, {"op": "ready"})
    channel.send(sock, {"op": "spawn", "listen_path": "/nowhere"})
    answer, (control, pidfd) = channel.receive(sock)
    note(f"worker {answer['pid']}")
    worker = socket.socket(fileno=control)
    if sys.argv[2].startswith("leave"):
        channel.send(sock, {"op": "leaving"})
        return 0
    if sys.argv[2] == "fail-later":
        return 0
    if sys.argv[2] == "stop-worker":
        worker.close()
        message, _ = channel.receive(sock)
        note(f"told {message['pid']} {message['code']}")
    time.sleep(60)
    return 0

def worker(control, listen_path):
    names = sorted(int(fd) for fd in os.listdir("/proc/self/fd"))
    alive = [fd for fd in names if fd > 2 and os.path.exists(f"/proc/self/fd/{fd}")]
    note(f"fds {len(alive)} session {os.getsid(0) == os.getpid()}")
    if sys.argv[2] == "stop-worker":
        control.recv(1)
        return 5
    time.sleep(60)
    return 0

if sys.argv[2] == "reload-nothing":
    sys.executable = "/nowhere"
spawner.VACANT_S, spawner.LOOK_S = 1.5, 0.05
vacant = (out.parent / "vacant").exists
sys.exit(spawner.run_spawner(agent, worker, vacant=vacant, stay=sys.argv[2] == "leave-and-stay"))
"""


class Running:
    def __init__(self, directory: Path, mode: str) -> None:
        self.notes = directory / "notes"
        self.notes.touch()
        self.vacant = directory / "vacant"
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(self.notes), mode], stderr=subprocess.DEVNULL
        )

    def said(self, word: str) -> list[list[str]]:
        lines = [line.split() for line in self.notes.read_text().splitlines()]
        return [line[1:] for line in lines if line[0] == word]

    def wait_for(self, word: str, number: int = 1) -> list[str]:
        until(lambda: len(self.said(word)) >= number)
        return self.said(word)[number - 1]


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[[str], Running]]:
    started: list[Running] = []

    def begin(mode: str) -> Running:
        started.append(Running(tmp_path, mode))
        return started[-1]

    yield begin
    for running in started:
        running.process.kill()
        running.process.wait()
        for (pid,) in running.said("worker") + running.said("agent"):
            if is_alive(int(pid)):
                os.kill(int(pid), signal.SIGKILL)


def test_a_killed_agent_is_started_again_and_workers_go_on(start):
    running = start("run")
    (agent,), (worker,) = running.wait_for("agent"), running.wait_for("worker")
    os.kill(int(agent), signal.SIGKILL)
    running.wait_for("agent", 2)
    assert is_alive(int(worker))


def test_stopping_ends_the_agent_and_leaves_the_workers(start):
    running = start("run")
    (agent,), (worker,) = running.wait_for("agent"), running.wait_for("worker")
    running.process.terminate()
    assert running.process.wait(10) == 0  # at once, not when the agent's time to stop is over
    assert not is_alive(int(agent))
    assert is_alive(int(worker))


def test_an_agent_that_cannot_start_ends_the_spawner_with_its_code(start):
    running = start("fail")
    assert running.process.wait(20) == 3
    assert len(running.said("agent")) == 1  # and is not tried again


def test_an_agent_that_cannot_start_again_is_tried_again_while_workers_live(start):
    running = start("fail-later")
    (worker,) = running.wait_for("worker")
    running.wait_for("agent", 3)
    assert is_alive(int(worker))
    assert running.process.poll() is None


def test_a_worker_inherits_its_channel_and_nothing_else(start):
    running = start("run")
    assert running.wait_for("fds") == ["1", "session", "True"]


def test_the_agent_is_told_how_a_worker_ended(start):
    running = start("stop-worker")
    (worker,) = running.wait_for("worker")
    assert running.wait_for("told") == [worker, "5"]
    until(lambda: not Path(f"/proc/{worker}").exists())  # reaped


def test_after_the_agent_left_to_another_it_ends_with_its_last_worker(start):
    running = start("leave")
    (worker,) = running.wait_for("worker")
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(1)
    assert len(running.said("agent")) == 1
    os.kill(int(worker), signal.SIGKILL)
    assert running.process.wait(20) == 0


def test_one_that_is_to_stay_waits_to_be_stopped_after_its_last_worker(start):
    """In Kubernetes the container would be started anew, and take everything back before its pod is deleted."""
    running = start("leave-and-stay")
    (worker,) = running.wait_for("worker")
    os.kill(int(worker), signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists())  # reaped
    with pytest.raises(subprocess.TimeoutExpired):
        running.process.wait(1)
    assert len(running.said("agent")) == 1
    running.process.terminate()
    assert running.process.wait(10) == 0


@pytest.mark.parametrize("mode", ["leave", "leave-and-stay"])
def test_workers_are_not_left_without_an_agent_when_the_other_one_is_gone(start, mode):
    running = start(mode)
    (worker,) = running.wait_for("worker")
    time.sleep(1)
    assert len(running.said("agent")) == 1
    running.vacant.touch()
    running.wait_for("agent", 2)
    assert is_alive(int(worker))
    assert running.process.poll() is None


def test_an_agent_that_is_away_for_a_moment_keeps_its_place(start):
    running = start("leave-and-stay")
    running.wait_for("worker")
    for _ in range(8):
        running.vacant.touch()
        time.sleep(0.2)
        running.vacant.unlink()
        time.sleep(0.2)
    assert len(running.said("agent")) == 1


def test_executed_anew_it_keeps_its_number_and_its_workers(start):
    running = start("reload")
    (agent,), (worker,) = running.wait_for("agent"), running.wait_for("worker")
    running.process.send_signal(signal.SIGHUP)
    running.wait_for("agent", 2)
    assert not is_alive(int(agent))
    assert is_alive(int(worker))
    running.wait_for("worker", 2)
    os.kill(int(worker), signal.SIGKILL)
    until(lambda: not Path(f"/proc/{worker}").exists())  # reaped: it is still a child
    assert running.process.poll() is None


def test_a_program_that_cannot_be_executed_anew_goes_on(start):
    running = start("reload-nothing")
    (worker,) = running.wait_for("worker")
    running.process.send_signal(signal.SIGHUP)
    running.wait_for("worker", 2)
    assert is_alive(int(worker))
    assert running.process.poll() is None


def test_the_first_process_never_imports_grpc():
    code = "import sys, csi_vduse.cli.main; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert not {"grpc", "google.protobuf", "pyroute2"} & loaded
