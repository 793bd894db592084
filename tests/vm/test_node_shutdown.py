"""Before a node goes down: what nobody uses is detached, the kernel does not wait long for what is mounted."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import grpc

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent
from tests.vm.test_agent import attach, detach, inspect, refused


def test_shutdown_detaches_what_is_unused_and_a_restarted_agent_takes_the_rest_back(
    own: RunningAgent, image: Path, tmp_path: Path
):
    other = tmp_path / "other.raw"
    with other.open("wb") as file:
        file.truncate(16 * MIB)
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    mounted = attach(own, image)
    attach(own, other, volume_id="unused")
    subprocess.run(["mkfs.ext4", "-q", mounted.path], check=True, timeout=120)
    subprocess.run(["mount", mounted.path, str(mount_point)], check=True, timeout=120)
    argv = ["csi-vduse", "shutdown", "--run-dir", str(own.run_dir), "--timeout", "120", "--output", "json"]
    done = subprocess.run(argv, check=True, capture_output=True, timeout=CALL_TIMEOUT_S)
    kept = {row["volume"]: row["kept"] for row in json.loads(done.stdout)}
    assert kept["unused"] == ""
    assert str(mount_point) in kept[mounted.volume_id]
    assert not Path("/sys/class/vduse/unused").exists()
    timeout = Path(f"/sys/class/vduse/{mounted.device_name}/msg_timeout")
    assert timeout.read_text().strip() == "1"
    with refused(grpc.StatusCode.UNAVAILABLE, "shuts down"):
        attach(own, other, volume_id="unused")
    own.stop()
    own.start()
    assert timeout.read_text().strip() == "30"
    assert inspect(own).attachment.state == agent_pb2.STATE_ATTACHED
    subprocess.run(["umount", str(mount_point)], check=True, timeout=120)
    detach(own)
