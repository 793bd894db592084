"""Workers and agents that are replaced by plan, under load, and killed in the middle of that."""

from __future__ import annotations

import random
import signal
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import agent_pb2
from tests.chaos.effort import Effort
from tests.chaos.vm import events
from tests.chaos.vm.load import attached, under_load
from tests.vm.conftest import CALL_TIMEOUT_S, START_TIMEOUT_S, RunningAgent, leaves_nothing, wait_until

pytestmark = pytest.mark.usefixtures("clean")


def hand_over(agent: RunningAgent, volume_id: str) -> int:
    """Hand a volume over; returns the new worker."""
    request = agent_pb2.HandoverRequest(volume_id=volume_id)
    answer = agent.stub.Handover(request, timeout=CALL_TIMEOUT_S)
    return int(answer.attachment.worker_pid)


def test_handovers_at_random_moments(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    with attached(shared, folder) as volumes, under_load(volumes, folder, dice.randrange(1 << 30)) as load:
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)
        for _ in range(effort.handovers):
            volume = dice.choice(volumes)
            events.a_moment(dice, 0.3)
            before = events.worker_of(shared, volume.id)
            assert hand_over(shared, volume.id) != before
            load.goes_on()
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)


@pytest.mark.parametrize("victim", ["old worker", "new worker", "agent"])
def test_handover_in_which_somebody_is_killed(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, victim: str
) -> None:
    with (
        attached(shared, folder) as volumes,
        under_load(volumes, folder, dice.randrange(1 << 30)) as load,
        ThreadPoolExecutor(1) as caller,
    ):
        for _ in range(max(2, effort.handovers // 6)):
            shared.wait_until_ready()
            volume = dice.choice(volumes)
            events.wait_for_writes(shared, volume.id)
            old, agent_pid, known = events.worker_of(shared, volume.id), shared.child_pid(), workers(shared)
            handing = caller.submit(hand_over, shared, volume.id)
            events.a_moment(dice, 0.4)
            new = workers(shared) - known
            events.kill_if_there({"old worker": {old}, "new worker": new, "agent": {agent_pid}}[victim])
            try:
                handing.result()
            except grpc.RpcError as error:
                print(f"the handover failed, as it may: {error}")
            if victim == "agent":
                shared.disconnect()
            load.goes_on()
            shared.wait_until_ready()
            events.wait_for_writes(shared, volume.id)
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)


def workers(agent: RunningAgent) -> set[int]:
    """All living children of the spawner: the agent's own process, and workers."""
    text = Path(f"/proc/{agent.process.pid}/task/{agent.process.pid}/children").read_text()
    return {int(pid) for pid in text.split()}


def test_agents_take_over_from_one_another_under_load(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    """As a surge upgrade of a DaemonSet does it: the next agent is there before the last one goes."""
    directory = folder / "a"
    directory.mkdir()
    agents = [RunningAgent(directory)]
    agents[0].start()
    try:
        with (
            leaves_nothing(agents[0]),
            attached(agents[0], folder) as volumes,
            under_load(volumes, folder, dice.randrange(1 << 30)) as load,
        ):
            for _ in range(max(2, effort.handovers // 10)):
                for volume in volumes:
                    events.wait_for_writes(agents[-1], volume.id)
                before = {volume.id: events.worker_of(agents[-1], volume.id) for volume in volumes}
                ready = directory / f"ready-{len(agents)}"
                agents.append(RunningAgent(directory, ("--take-over", "--ready-file", str(ready))))
                agents[-1].start()  # who answers may still be the other one
                agents[-2].disconnect()
                wait_until(ready.exists, "end of the takeover", START_TIMEOUT_S + events.REPLACED_WITHIN_S)
                for volume_id, pid in before.items():
                    assert events.worker_of(agents[-1], volume_id) != pid
                # The other container ends, and with it all that is left in it.
                agents[-2].process.send_signal(signal.SIGKILL)
                agents[-2].process.wait(60)
                load.goes_on()
            for volume in volumes:
                events.wait_for_writes(agents[-1], volume.id)
            agents[0].disconnect()  # it speaks to whoever is there now
    finally:
        print(agents[0].log.read_text())  # all of them write to it; shown if this fails
        for agent in agents:
            if agent.process.poll() is None:
                agent.stop()
