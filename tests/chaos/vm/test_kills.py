"""Workers and agents killed with -9 at random moments, under load that checks every byte."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from csi_vduse.proto import agent_pb2
from tests.chaos.effort import Effort
from tests.chaos.vm import events
from tests.chaos.vm.load import (
    SHAPES,
    Shape,
    Volume,
    attach,
    attach_request,
    attached,
    file_backend,
    give_back,
    make_image,
    one_attached,
    under_load,
)
from tests.vm.conftest import MIB, PARALLEL, RunningAgent

pytestmark = pytest.mark.usefixtures("clean")


@PARALLEL
def test_workers_killed_at_random_moments(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    with attached(shared, folder) as volumes, under_load(volumes, folder, dice.randrange(1 << 30)) as load:
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)
        for _ in range(effort.worker_kills):
            volume = dice.choice(volumes)
            events.a_moment(dice, 0.5)
            events.kill_worker(shared, volume.id)
            if dice.random() < 0.5:  # otherwise the next kill may hit it before it has replayed anything
                events.wait_for_writes(shared, volume.id)
            load.goes_on()
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)


def test_all_workers_killed_at_once(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    with attached(shared, folder) as volumes, under_load(volumes, folder, dice.randrange(1 << 30)) as load:
        for _ in range(max(2, effort.worker_kills // 50)):
            for volume in volumes:
                events.wait_for_writes(shared, volume.id)
            pids = [events.worker_of(shared, volume.id) for volume in volumes]
            for pid in pids:
                events.kill(pid)
            load.goes_on()
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)


def test_agent_killed_at_random_moments_does_not_stop_io(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    """Half of the time a worker dies with it, and the next agent has to notice that by itself."""
    with attached(shared, folder) as volumes, under_load(volumes, folder, dice.randrange(1 << 30)) as load:
        for number in range(effort.agent_kills):
            shared.wait_until_ready()
            workers = {volume.id: events.worker_of(shared, volume.id) for volume in volumes}
            events.a_moment(dice, 0.5)
            victim = dice.choice(volumes).id if number % 2 else ""
            events.kill_agent(shared)
            if victim:
                events.kill(workers[victim])
            load.goes_on()
            shared.wait_until_ready()
            for volume_id, pid in workers.items():
                now = events.worker_of(shared, volume_id)
                assert (now == pid) is (volume_id != victim), "only who died is replaced"
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)


@pytest.mark.parametrize("operation", ["attach", "detach", "expand"])
def test_agent_killed_in_an_operation_leaves_no_half_of_it(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, operation: str
) -> None:
    """Another volume is under load meanwhile; the caller tries again, as kubelet does, and gets what it asked for."""
    shape = dice.choice([shape for shape in SHAPES if not shape.ext4])
    image = make_image(folder / "subject.raw", 16 * MIB)
    size = image.stat().st_size
    attach_it = attach_request("subject", file_backend(image), shape, size)
    detach_it = agent_pb2.DetachRequest(volume_id="subject")
    with (
        one_attached(shared, folder, "bystander", Shape(1, dice.random() < 0.5, ext4=True)) as bystander,
        under_load([bystander], folder, dice.randrange(1 << 30)) as load,
        ThreadPoolExecutor(1) as caller,
    ):
        for _ in range(max(2, effort.agent_kills // 3)):
            if operation != "attach":
                events.call_until_it_works(shared, "Attach", attach_it)
            if operation == "expand":
                size += MIB
                with image.open("r+b") as file:
                    file.truncate(size)
            request = {
                "attach": ("Attach", attach_it),
                "detach": ("Detach", detach_it),
                "expand": ("Resize", agent_pb2.ResizeRequest(volume_id="subject", capacity_bytes=size)),
            }[operation]
            done = caller.submit(events.call_until_it_works, shared, *request)
            events.a_moment(dice, 1.0)
            events.kill(shared.child_pid())
            answer = done.result()
            if operation == "attach":
                assert isinstance(answer, agent_pb2.Attachment)
                assert Path(answer.path).read_bytes()[:512] == bytes(512)
            elif operation == "expand":
                assert isinstance(answer, agent_pb2.Attachment)
                assert int(Path(f"/sys/block/{Path(answer.path).name}/size").read_text()) * 512 == size
            events.call_until_it_works(shared, "Detach", detach_it)
            load.goes_on()


def test_worker_killed_while_a_file_system_is_made(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    for number in range(effort.mkfs_kills):
        shape = dice.choice(SHAPES)
        with ThreadPoolExecutor(1) as maker:
            volume_id = f"mkfs-{number}"
            made = maker.submit(
                attach, shared, folder, volume_id, Shape(shape.queues, shape.packed, ext4=True)
            )
            _kill_soon(shared, volume_id, dice)
            volume: Volume = made.result()
        (volume.target / "file").write_bytes(bytes(range(256)) * 64)
        give_back(shared, volume)


def _kill_soon(agent: RunningAgent, volume_id: str, dice: random.Random) -> None:
    """Kill the worker of a volume that is being attached, once it has written something of the new file system."""
    events.wait_until(
        lambda: any(
            each.volume_id == volume_id for each in agent.stub.List(agent_pb2.ListRequest()).attachments
        ),
        "attach",
        events.REPLACED_WITHIN_S,
    )
    events.wait_for_writes(agent, volume_id)
    events.a_moment(dice, 0.2)
    events.kill_worker(agent, volume_id)
