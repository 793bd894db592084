"""What is done to workers and agents, and how tests wait until that is over."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import grpc

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, RunningAgent, kill, wait_until

REPLACED_WITHIN_S = 240


def inspect(agent: RunningAgent, volume_id: str) -> agent_pb2.InspectResponse:
    return agent.stub.Inspect(agent_pb2.InspectRequest(volume_id=volume_id), timeout=CALL_TIMEOUT_S)


def worker_of(agent: RunningAgent, volume_id: str) -> int:
    """The worker that serves a volume now; waits for one."""
    found = 0

    def serves() -> bool:
        nonlocal found
        try:
            attachment = inspect(agent, volume_id).attachment
        except grpc.RpcError:
            agent.disconnect()  # it is being replaced
            return False
        found = attachment.worker_pid
        return attachment.state == agent_pb2.STATE_ATTACHED and found > 0

    wait_until(serves, f"a worker of {volume_id}", REPLACED_WITHIN_S)
    return found


def written(agent: RunningAgent, volume_id: str) -> int:
    """Writes that the worker of now has done; a new worker begins at 0."""
    counts = [each.count for each in inspect(agent, volume_id).stats.operations if each.operation == "write"]
    return sum(counts)


def wait_for_writes(agent: RunningAgent, volume_id: str) -> None:
    """Wait until whoever serves the volume has written: its I/O goes on."""
    wait_until(lambda: written(agent, volume_id) > 0, f"writing of {volume_id}", REPLACED_WITHIN_S)


def goes_on(agent: RunningAgent, volume_id: str) -> None:
    """Wait until the worker of now has written more than by now."""
    before = written(agent, volume_id)
    wait_until(lambda: written(agent, volume_id) > before, f"writing of {volume_id}", REPLACED_WITHIN_S)


def kill_worker(agent: RunningAgent, volume_id: str) -> None:
    """Kill the worker of a volume, whichever it is; fine if it dies by itself meanwhile."""
    pid = worker_of(agent, volume_id)
    try:
        kill(pid)
    except ProcessLookupError:
        return
    wait_until(lambda: not is_worker(pid), f"end of worker {pid}")


def kill_if_there(pids: set[int]) -> None:
    """Kill these, as far as they have not ended by themselves."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            kill(pid)


def is_worker(pid: int) -> bool:
    """Whether a process of that number runs, and is no zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return text.rpartition(")")[2].split()[0] not in {"Z", "X"}


def kill_agent(agent: RunningAgent) -> None:
    """Kill the agent's process; its spawner starts another one, which the next call waits for."""
    kill(agent.child_pid())
    agent.disconnect()


def a_moment(dice: random.Random, longest_s: float) -> None:
    """Let a random time pass: the one thing that chaos has to do by the clock."""
    time.sleep(dice.uniform(0, longest_s))


def stop_for(pid: int, stopped_s: float) -> None:
    """Stop a worker, as a debugger or an overloaded machine does, and let it go on if nobody has killed it since."""
    os.kill(pid, signal.SIGSTOP)
    try:
        time.sleep(stopped_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def call_until_it_works(agent: RunningAgent, call: str, request: object) -> object:
    """Make a call again and again as its caller would, over restarts of the agent."""
    deadline = time.monotonic() + CALL_TIMEOUT_S
    while True:
        try:
            return getattr(agent.stub, call)(request, timeout=CALL_TIMEOUT_S)
        except grpc.RpcError as error:
            again = {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.ABORTED, grpc.StatusCode.CANCELLED}
            if not isinstance(error, grpc.Call) or error.code() not in again or time.monotonic() > deadline:
                raise
            agent.disconnect()
            agent.wait_until_ready()
