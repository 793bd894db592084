"""Volumes whose rings a vhost-user server works on by itself: data right while it and the worker are killed."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.exports import exported, fio
from tests.vm.test_agent import detach, inspect, refused
from tests.vm.test_force_detach import LONGEST_S, detach_by_force, in_flight, waiting_readers
from tests.vm.test_recovery import verified_writing
from tests.vm.vhost_user_servers import VOLUME, Server, attach, ours, qsd, rte, serving

KILLS = 3
JOB = ("--rw=randwrite", "--bsrange=512-64k", "--size=8m", "--blockalign=512")
WRITER = ("--ioengine=libaio", "--iodepth=32", "--size=8M")


@pytest.fixture(params=[ours, rte, qsd])
def server(request: pytest.FixtureRequest, image: Path, tmp_path: Path) -> Iterator[Server]:
    with serving(request.param(tmp_path / "disk.sock", image)) as made:
        yield made


def remote(agent: RunningAgent) -> agent_pb2.RemoteStats:
    return inspect(agent).stats.remote


def wait_for_progress(agent: RunningAgent) -> None:
    """The application goes on: it is interrupted."""
    before = inspect(agent).stats.interrupts
    wait_until(lambda: inspect(agent).stats.interrupts > before + 50, "progress")


def kill_worker(agent: RunningAgent) -> None:
    """Kill the worker of now, and wait for the next."""
    victim = inspect(agent).attachment.worker_pid
    kill(victim)

    def replaced() -> bool:
        found = inspect(agent).attachment
        return found.worker_pid not in (0, victim) and found.state == agent_pb2.STATE_ATTACHED

    wait_until(replaced, "replacement")


def test_with_limits_a_volume_goes_through_the_engine(shared: RunningAgent, server: Server):
    limits = agent_pb2.Throttle(iops=200)
    with leaves_nothing(shared):
        path = attach(shared, server, throttle=limits, packed=True)
        fio(Path(path), "libaio", "--number_ios=300", *JOB)
        stats = inspect(shared).stats
        assert sum(each.count for each in stats.operations if each.operation == "write") > 250
        assert stats.throttled > 0
        kill_server(shared, server)
        fio(Path(path), "libaio", "--number_ios=50", *JOB)
        detach(shared)


@pytest.mark.parametrize("queues", [1, 2])
def test_what_is_written_is_in_the_servers_image(
    shared: RunningAgent, server: Server, image: Path, queues: int
):
    data = os.urandom(4 * MIB)
    with leaves_nothing(shared):
        path = attach(shared, server, queues=queues)
        with Path(path).open("r+b") as disk:
            disk.write(data)
            disk.flush()
            os.fsync(disk.fileno())
        fio(Path(path), "libaio", "--offset=4m", *JOB)
        detach(shared)
        assert image.read_bytes()[: len(data)] == data


def test_a_read_only_volume_of_a_disk_that_may_be_written(shared: RunningAgent, server: Server, image: Path):
    data = os.urandom(MIB)
    with image.open("r+b") as file:
        file.write(data)
    with leaves_nothing(shared):
        path = attach(shared, server, read_only=True)
        assert Path("/sys/block", Path(path).name, "ro").read_text().strip() == "1"
        assert Path(path).read_bytes()[:MIB] == data
        detach(shared)


def kill_server(agent: RunningAgent, server: Server) -> None:
    losses = remote(agent).losses
    server.kill()
    wait_until(lambda: remote(agent).losses > losses, "the loss being seen")
    server.start()


def kill_both(agent: RunningAgent, server: Server) -> None:
    victim = inspect(agent).attachment.worker_pid
    server.kill()
    kill(victim)
    server.start()
    wait_until(lambda: inspect(agent).attachment.worker_pid not in (0, victim), "replacement")


@pytest.mark.parametrize(
    "act",
    [kill_server, lambda agent, _: kill_worker(agent), kill_both],
    ids=["server", "worker", "both"],
)
def test_no_write_is_lost_when_any_of_them_is_killed(
    shared: RunningAgent, server: Server, act: Callable[[RunningAgent, Server], None]
):
    with leaves_nothing(shared):
        path = attach(shared, server, queues=2)
        with verified_writing(path, *WRITER) as writer:
            for _ in range(KILLS):
                wait_for_progress(shared)
                act(shared, server)
            wait_for_progress(shared)
            assert writer.poll() is None
        detach(shared)


# Neither QEMU 7.2 nor, as anything but an experiment, DPDK 22.11 tells of it.
@pytest.mark.parametrize("server", [ours], indirect=True)
@pytest.mark.parametrize("limits", [None, agent_pb2.Throttle(iops=10000)], ids=["direct", "mediated"])
def test_a_disk_that_grows_at_its_server_grows(
    shared: RunningAgent, server: Server, image: Path, limits: agent_pb2.Throttle | None
):
    with leaves_nothing(shared):
        disk = Path("/sys/class/block", Path(attach(shared, server, throttle=limits)).name, "size")
        for size_bytes in (24 * MIB, 32 * MIB):  # the second with another worker
            server.grow(image, size_bytes)
            wait_until(lambda wanted=size_bytes // 512: int(disk.read_text()) == wanted, "the disk's size")
            assert inspect(shared).attachment.capacity_bytes == size_bytes
            kill_worker(shared)
            wait_until(lambda: remote(shared).connected == 1, "a connection")
        assert int(disk.read_text()) == 32 * MIB // 512
        detach(shared)


@pytest.mark.parametrize("server", [ours], indirect=True)
def test_a_disk_that_is_shown_in_part_stays_as_it_is(shared: RunningAgent, server: Server, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, server, capacity_bytes=8 * MIB)
        server.grow(image, 24 * MIB)
        fio(Path(path), "libaio", "--number_ios=100", *JOB)
        assert inspect(shared).attachment.capacity_bytes == 8 * MIB
        detach(shared)


def test_a_volume_is_handed_over_and_held(shared: RunningAgent, server: Server, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, server)
        with verified_writing(path, *WRITER) as writer:
            for _ in range(KILLS):
                wait_for_progress(shared)
                request = agent_pb2.HandoverRequest(volume_id=VOLUME)
                shared.stub.Handover(request, timeout=CALL_TIMEOUT_S)
            wait_for_progress(shared)
            shared.stub.Quiesce(agent_pb2.QuiesceRequest(volume_id=VOLUME, hold_s=60), timeout=CALL_TIMEOUT_S)
            held = image.read_bytes()
            wait_until(lambda: in_flight(path) > 0, "requests that wait")
            assert image.read_bytes() == held
            shared.stub.Resume(agent_pb2.ResumeRequest(volume_id=VOLUME), timeout=CALL_TIMEOUT_S)
            wait_for_progress(shared)
            assert writer.poll() is None
        detach(shared)


def test_what_waits_for_a_server_that_hangs_fails_when_the_volume_is_taken_away(
    shared: RunningAgent, server: Server
):
    with leaves_nothing(shared):
        path = attach(shared, server)
        subprocess.run(["dd", f"if={path}", "of=/dev/null", "count=1"], check=True, capture_output=True)
        wait_until(
            lambda: in_flight(path) == 0, "the scan for partitions, which later readers would wait for"
        )
        server.hang()
        readers = waiting_readers(path)
        assert detach_by_force(shared) < LONGEST_S
        for reader in readers:
            assert b"Input/output error" in reader.communicate(timeout=CALL_TIMEOUT_S)[1]


def test_a_server_has_one_volume_at_a_time(shared: RunningAgent, server: Server):
    with leaves_nothing(shared):
        attach(shared, server)
        with refused(
            grpc.StatusCode.FAILED_PRECONDITION, f"volume {VOLUME} is attached to the vhost-user server"
        ):
            attach(shared, server, volume_id="another")
        detach(shared)


def test_an_export_of_a_server_is_served_by_hand(server: Server):
    with exported("--backend", f"vhost-user:{server.socket}", "by-hand") as (device, process):
        fio(device, "libaio", *JOB)
        process.terminate()
        assert process.wait(120) == 0
