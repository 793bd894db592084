"""A volume whose backend never comes back: what waits fails, and the disk goes, in bounded time."""

from __future__ import annotations

import os
import subprocess
import time
from pathlib import Path

import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.test_agent import attach, inspect

# Emulated, beside others; the steps themselves are bounded by the agent's step timeout of 60 s each.
LONGEST_S = 150


def detach_by_force(agent: RunningAgent) -> float:
    """Detach; return how long it took."""
    began = time.monotonic()
    request = agent_pb2.DetachRequest(volume_id="vol-0123456789abcdef", force=True)
    agent.stub.Detach(request, timeout=CALL_TIMEOUT_S)
    return time.monotonic() - began


def lose_backend(agent: RunningAgent, image: Path) -> None:
    """The image goes away and with it the worker; no other can start."""
    image.rename(image.with_suffix(".away"))
    kill(inspect(agent).attachment.worker_pid)
    wait_until(
        lambda: "does not exist" in inspect(agent).attachment.state_reason, "report of what is missing"
    )


def waiting_readers(path: str) -> list[subprocess.Popen[bytes]]:
    """Three that read a disk whose backend does not answer; returns when all wait."""
    argv = ["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=4", "iflag=direct"]
    readers = [subprocess.Popen(argv, stderr=subprocess.PIPE) for _ in range(3)]
    wait_until(lambda: in_flight(path) >= len(readers), "requests that wait")
    return readers


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_what_waits_for_a_backend_that_is_gone_fails_and_the_disk_goes(
    shared: RunningAgent, image: Path, *, packed: bool
):
    with leaves_nothing(shared):
        path = attach(shared, image, packed=packed).path
        lose_backend(shared, image)
        readers = waiting_readers(path)
        assert detach_by_force(shared) < LONGEST_S
        for reader in readers:
            assert b"Input/output error" in reader.communicate(timeout=CALL_TIMEOUT_S)[1]
            assert reader.returncode == 1
        assert not Path(path).exists()


def test_a_mounted_disk_is_taken_away(shared: RunningAgent, image: Path, tmp_path: Path):
    os.truncate(image, 64 * MIB)
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=120)
    with leaves_nothing(shared):
        path = attach(shared, image, capacity_bytes=64 * MIB).path
        subprocess.run(["mount", path, str(mount_point)], check=True, timeout=120)
        (mount_point / "before").write_text("kept")
        os.sync()
        lose_backend(shared, image)
        assert detach_by_force(shared) < LONGEST_S
        with pytest.raises(OSError):
            (mount_point / "after").write_text("lost")
        subprocess.run(["umount", str(mount_point)], check=True, timeout=120)
    away = image.with_suffix(".away")
    subprocess.run(["e2fsck", "-fy", str(away)], check=False, timeout=120)
    subprocess.run(["mount", "-o", "loop,ro", str(away), str(mount_point)], check=True, timeout=120)
    try:
        assert (mount_point / "before").read_text() == "kept"
    finally:
        subprocess.run(["umount", str(mount_point)], check=True, timeout=120)


def test_a_healthy_volume_can_be_forced_too_and_keeps_its_data(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, image).path
        data = os.urandom(MIB)
        with open(path, "wb") as disk:  # noqa: PTH123 - a device node
            disk.write(data)
            disk.flush()
            os.fsync(disk.fileno())
            detach_by_force(shared)
    assert image.read_bytes()[:MIB] == data


def in_flight(path: str) -> int:
    return sum(int(part) for part in Path(f"/sys/block/{Path(path).name}/inflight").read_text().split())
