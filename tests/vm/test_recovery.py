"""Workers and agents are killed while fio writes and verifies: the application sees a pause, and nothing else."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, PARALLEL, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.test_agent import attach, detach, inspect

KILLS = 5
RING_PACKED = 1 << 34  # VIRTIO 1.3, 6
VERIFY = ("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=64")


@contextmanager
def verified_writing(path: str, *options: str) -> Iterator[subprocess.Popen[str]]:
    """Write random blocks with checksums and read them back, until the body ends; both have to be right."""
    argv = [
        "fio",
        "--name=under-fire",
        f"--filename={path}",
        "--direct=1",
        "--rw=randwrite",
        "--bsrange=4k-32k",
    ]
    argv += ["--time_based", "--runtime=600", "--size=12M", *VERIFY, *options]
    fio = subprocess.Popen(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd="/tmp")
    try:
        yield fio
        fio.terminate()  # it ends its loop and says how it went
        output = fio.communicate(timeout=CALL_TIMEOUT_S)[0]
    finally:
        fio.kill()
        fio.wait()
        assert fio.stdout is not None
        fio.stdout.close()
    # Ended by a signal fio has 128 and its number, or 0; what went wrong it says by "verify:" or "err=".
    assert "verify:" not in output.replace("verify: ", "verify:") or "bad" not in output, output
    assert "err= 0" in output, output


def writes(agent: RunningAgent) -> int:
    counts = [each.count for each in inspect(agent).stats.operations if each.operation == "write"]
    return sum(counts)


def kill_worker_when_it_writes(agent: RunningAgent) -> None:
    """Wait until the worker of now has written, kill it, and wait for the next."""
    wait_until(lambda: writes(agent) > 50, "writing")
    victim = inspect(agent).attachment.worker_pid
    kill(victim)
    wait_until(
        lambda: (
            inspect(agent).attachment.worker_pid not in (0, victim)
            and inspect(agent).attachment.state == agent_pb2.STATE_ATTACHED
        ),
        "replacement",
    )


@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
@pytest.mark.parametrize(
    ("queues", "packed"),
    [(1, False), pytest.param(2, False, marks=PARALLEL), pytest.param(2, True, marks=PARALLEL)],
)
def test_no_write_is_lost_when_workers_are_killed(
    shared: RunningAgent, image: Path, engine: str, queues: int, *, packed: bool
):
    with leaves_nothing(shared):
        path = attach(shared, image, queues=queues, packed=packed).path
        assert bool(inspect(shared).features & RING_PACKED) is packed
        with verified_writing(
            path,
            f"--ioengine={engine}",
            "--iodepth=32",
            f"--numjobs={queues}",
            "--offset_increment=4M",
            "--size=4M",
        ) as fio:
            for _ in range(KILLS):
                kill_worker_when_it_writes(shared)
                assert fio.poll() is None
        detach(shared)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("queues", [2, pytest.param(4, marks=PARALLEL)])
def test_what_was_written_is_there_after_the_driver_was_reset(
    shared: RunningAgent, image: Path, queues: int, *, packed: bool
):
    """The driver is unbound from the device and bound again, which resets it, between writing and verifying."""
    with leaves_nothing(shared):
        disk = Path(attach(shared, image, queues=queues, packed=packed).path)
        argv = [
            "fio",
            "--name=reset",
            f"--filename={disk}",
            "--ioengine=libaio",
            "--iodepth=16",
            "--direct=1",
        ]
        argv += ["--rw=randwrite", "--bsrange=4k-64k", "--size=8M", *VERIFY]
        for seed in (1, 2):
            again = [*argv, f"--randseed={seed}"]
            subprocess.run(again, check=True, timeout=CALL_TIMEOUT_S, cwd="/tmp", stdout=subprocess.DEVNULL)
            virtio = Path(f"/sys/block/{disk.name}/device").resolve().name
            for action in ("unbind", "bind"):
                Path(f"/sys/bus/virtio/drivers/virtio_blk/{action}").write_text(virtio)
            wait_until(disk.exists, "return of the disk")
            verify = [*again, "--verify_only"]
            subprocess.run(verify, check=True, timeout=CALL_TIMEOUT_S, cwd="/tmp", stdout=subprocess.DEVNULL)
        detach(shared)


def test_io_goes_on_when_agent_and_worker_are_killed_together(own: RunningAgent, image: Path):
    path = attach(own, image).path
    with verified_writing(path, "--ioengine=libaio", "--iodepth=16") as fio:
        for _ in range(2):
            wait_until(lambda: writes(own) > 50, "writing")
            victim = inspect(own).attachment.worker_pid
            os.kill(own.child_pid(), 9)
            kill(victim)
            own.disconnect()
            own.wait_until_ready()
            wait_until(
                lambda victim=victim: inspect(own).attachment.worker_pid not in (0, victim), "replacement"
            )
            assert fio.poll() is None
    detach(own)


def test_a_file_system_survives_the_death_of_its_worker(shared: RunningAgent, image: Path, tmp_path: Path):
    os.truncate(image, 64 * MIB)
    with leaves_nothing(shared):
        path = attach(shared, image, capacity_bytes=64 * MIB).path
        subprocess.run(["mkfs.ext4", "-q", path], check=True, timeout=120)
        mount_point = tmp_path / "mnt"
        mount_point.mkdir()
        subprocess.run(["mount", path, str(mount_point)], check=True, timeout=120)
        data = os.urandom(MIB)
        for number in range(5):
            with (mount_point / f"file{number}").open("wb") as file:
                file.write(data)
                kill(inspect(shared).attachment.worker_pid)
                file.flush()
                os.fsync(file.fileno())
            assert (mount_point / f"file{number}").read_bytes() == data
            wait_until(lambda: inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED, "replacement")
        subprocess.run(["umount", str(mount_point)], check=True, timeout=120)
        subprocess.run(["e2fsck", "-fn", path], check=True, timeout=120)
        detach(shared)
