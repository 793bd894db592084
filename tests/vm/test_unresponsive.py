"""A worker that is stopped while the kernel waits for its answer is replaced, and the device is not lost."""

from __future__ import annotations

import os
import signal
import subprocess
from pathlib import Path

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, RunningAgent, leaves_nothing, wait_until
from tests.vm.test_agent import attach, detach, inspect


def test_a_reset_that_meets_a_stopped_worker_is_answered_by_its_successor(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        disk = Path(attach(shared, image).path)
        virtio = Path(f"/sys/block/{disk.name}/device").resolve().name
        before = inspect(shared).attachment.worker_pid
        os.kill(before, signal.SIGSTOP)
        for action in ("unbind", "bind"):  # both ask the worker
            argv = ["tee", f"/sys/bus/virtio/drivers/virtio_blk/{action}"]
            subprocess.run(
                argv, input=virtio.encode(), check=True, timeout=CALL_TIMEOUT_S, capture_output=True
            )
        after = inspect(shared).attachment
        assert after.worker_pid not in (0, before)
        assert after.state == agent_pb2.STATE_ATTACHED
        wait_until(disk.exists, "return of the disk")
        argv = ["dd", f"if={disk}", "of=/dev/null", "bs=64k", "count=16", "iflag=direct"]
        subprocess.run(argv, check=True, timeout=CALL_TIMEOUT_S, capture_output=True)
        detach(shared)
