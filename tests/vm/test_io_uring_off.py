"""kernel.io_uring_disabled=2, as some distributions have it: said at once, and what was attached before can go."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.test_agent import attach, inspect, refused
from tests.vm.test_force_detach import detach_by_force

SWITCH = Path("/proc/sys/kernel/io_uring_disabled")

pytestmark = pytest.mark.skipif(
    not SWITCH.exists(), reason="io_uring cannot be switched off before Linux 6.6"
)


@contextmanager
def io_uring_off() -> Iterator[None]:
    before = SWITCH.read_text()
    SWITCH.write_text("2")
    try:
        yield
    finally:
        SWITCH.write_text(before)


def test_an_attach_is_refused_at_once_and_probe_and_doctor_say_why(shared: RunningAgent, image: Path):
    with leaves_nothing(shared), io_uring_off():
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "kernel.io_uring_disabled"):
            attach(shared, image)
        probe = shared.stub.Probe(agent_pb2.ProbeRequest(), timeout=CALL_TIMEOUT_S)
        assert not probe.ready
        assert any("io_uring" in problem for problem in probe.problems)
        told = subprocess.run(
            ["csi-vduse", "doctor"], check=False, capture_output=True, text=True, timeout=120
        )
        assert told.returncode != 0
        assert "io_uring_disabled" in told.stdout


def test_a_worker_that_dies_meanwhile_is_replaced_when_it_is_back(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, image).path
        with io_uring_off():
            kill(inspect(shared).attachment.worker_pid)
            wait_until(lambda: "io_uring" in inspect(shared).attachment.state_reason, "the reason")
        wait_until(lambda: inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED, "service")
        subprocess.run(
            ["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=4", "iflag=direct"], check=True, timeout=60
        )
        shared.stub.Detach(agent_pb2.DetachRequest(volume_id="vol-0123456789abcdef"), timeout=CALL_TIMEOUT_S)


def test_a_volume_can_be_detached_by_force(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, image).path
        with io_uring_off():
            kill(inspect(shared).attachment.worker_pid)
            reader = subprocess.Popen(
                ["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=4", "iflag=direct"],
                stderr=subprocess.PIPE,
            )
            wait_until(lambda: "io_uring" in inspect(shared).attachment.state_reason, "the reason")
            assert detach_by_force(shared) < CALL_TIMEOUT_S
            assert b"Input/output error" in reader.communicate(timeout=CALL_TIMEOUT_S)[1]
        assert not Path(path).exists()
