"""Workers that stand still, are reset while dead, or are taken by the OOM killer."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.chaos.effort import Effort
from tests.chaos.vm import events, kernel_log
from tests.chaos.vm.load import SHAPES, Shape, Volume, attached, one_attached, under_load
from tests.vm.conftest import RunningAgent, leaves_nothing, wait_until
from tests.vm.exports import tool


@pytest.mark.usefixtures("clean")
def test_worker_stopped_under_load_goes_on(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    with attached(shared, folder) as volumes, under_load(volumes, folder, dice.randrange(1 << 30)) as load:
        volume = dice.choice(volumes)
        events.stop_for(events.worker_of(shared, volume.id), effort.stopped_s)
        load.goes_on()
        for each in volumes:
            before = events.written(shared, each.id)
            wait_until(lambda e=each, b=before: events.written(shared, e.id) > b, "writing", 240)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_driver_reset_while_the_worker_is_dead(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, packed: bool
) -> None:
    """The agent is held meanwhile, so that the reset really finds nobody; the next worker answers it."""
    with one_attached(shared, folder, "reset", Shape(2, packed, ext4=False)) as volume:
        _reset_again_and_again(shared, volume, effort.resets, dice)


def _reset_again_and_again(shared: RunningAgent, volume: Volume, resets: int, dice: random.Random) -> None:
    virtio = Path(f"/sys/block/{volume.disk.name}/device").resolve().name
    for number in range(resets):
        checks = [
            "--rw=randwrite",
            "--bs=4k",
            "--size=2M",
            f"--randseed={dice.randrange(1 << 30)}",
            "--verify=crc32c",
        ]
        argv = [
            "fio",
            "--name=reset",
            f"--filename={volume.disk}",
            "--direct=1",
            "--ioengine=libaio",
            "--iodepth=16",
        ]
        tool(*argv, *checks, "--do_verify=0", "--verify_state_save=0")
        pid = events.worker_of(shared, volume.id)
        _while_the_worker_is_dead(
            shared,
            pid,
            lambda: Path("/sys/bus/virtio/drivers/virtio_blk/unbind").write_text(virtio),
        )
        if number % 2:
            events.kill_worker(shared, volume.id)
        Path("/sys/bus/virtio/drivers/virtio_blk/bind").write_text(virtio)
        wait_until(volume.disk.exists, "return of the disk")
        tool(*argv, *checks, "--verify_only", "--verify_state_save=0")


@pytest.mark.usefixtures("clean")
def test_worker_stopped_while_the_kernel_waits_for_its_answer(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    shape = dice.choice([shape for shape in SHAPES if not shape.ext4])
    with one_attached(shared, folder, "stopped", shape) as volume:
        _stop_in_a_reset(shared, volume, effort.stopped_in_control_s)
        with under_load([volume], folder, dice.randrange(1 << 30)):
            events.wait_for_writes(shared, volume.id)


def _stop_in_a_reset(shared: RunningAgent, volume: Volume, stopped_s: float) -> None:
    virtio = Path(f"/sys/block/{volume.disk.name}/device").resolve().name
    pid = events.worker_of(shared, volume.id)
    with ThreadPoolExecutor(1) as resetter:
        os.kill(pid, signal.SIGSTOP)
        reset = resetter.submit(Path("/sys/bus/virtio/drivers/virtio_blk/unbind").write_text, virtio)
        events.stop_for(pid, stopped_s)
        reset.result()
    Path("/sys/bus/virtio/drivers/virtio_blk/bind").write_text(virtio)
    wait_until(volume.disk.exists, "return of the disk")


def test_worker_killed_for_want_of_memory(shared: RunningAgent, folder: Path, dice: random.Random) -> None:
    """The kernel spares workers; one that it may take, in a container without that right, is replaced as any other."""
    with (
        kernel_log.stays_quiet(except_for="Call Trace"),  # the OOM killer prints one
        leaves_nothing(shared),
        attached(shared, folder, SHAPES[:2]) as volumes,
        under_load(volumes, folder, dice.randrange(1 << 30)),
    ):
        for volume in volumes:
            events.wait_for_writes(shared, volume.id)
        pids = [events.worker_of(shared, volume.id) for volume in volumes]
        waits = [sys.executable, "-S", "-c", "print(flush=True); input()"]
        with subprocess.Popen(waits, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as bystander:
            assert bystander.stdout
            bystander.stdout.readline()  # before that its memory may be ours still: vfork
            _prefer(bystander.pid)
            _run_out_of_memory()
            assert bystander.wait(60) == -signal.SIGKILL
        assert [events.worker_of(shared, volume.id) for volume in volumes] == pids
        _prefer(pids[0])
        _run_out_of_memory()
        wait_until(lambda: events.worker_of(shared, volumes[0].id) != pids[0], "replacement")
        events.wait_for_writes(shared, volumes[0].id)


def _prefer(pid: int) -> None:
    """Have the OOM killer choose this process first."""
    Path(f"/proc/{pid}/oom_score_adj").write_text("1000")


def _run_out_of_memory() -> None:
    """What the kernel does when there is no memory left, without the wait for that."""
    Path("/proc/sysrq-trigger").write_text("f")


def _while_the_worker_is_dead(agent: RunningAgent, pid: int, act: Callable[[], object]) -> None:
    """Do something that the kernel finishes only with a worker's answer, begun while there is none."""
    keeper = agent.child_pid()
    os.kill(keeper, signal.SIGSTOP)
    try:
        events.kill(pid)
        wait_until(lambda: not events.is_worker(pid), "end of the worker")
        with ThreadPoolExecutor(1) as actor:
            done = actor.submit(act)
            wait_until(lambda: done.running() or done.done(), "beginning")
            events.a_moment(random.Random(pid), 0.5)
            os.kill(keeper, signal.SIGCONT)
            done.result(240)
    finally:
        os.kill(keeper, signal.SIGCONT)
