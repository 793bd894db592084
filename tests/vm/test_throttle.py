"""Limits on a real disk: what passes in a second, what changes while fio runs, and what is counted."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, leaves_nothing, traces, wait_until
from tests.vm.exports import tool
from tests.vm.test_agent import attach, detach, inspect

VOLUME = "vol-0123456789abcdef"


def limits(iops: int = 0, bytes_per_s: int = 0, burst_s: float = 0.1) -> agent_pb2.Throttle:
    return agent_pb2.Throttle(iops=iops, bytes_per_s=bytes_per_s, burst_s=burst_s)


def set_throttle(agent: RunningAgent, throttle: agent_pb2.Throttle) -> agent_pb2.Attachment:
    request = agent_pb2.SetThrottleRequest(volume_id=VOLUME, throttle=throttle)
    return agent.stub.SetThrottle(request, timeout=CALL_TIMEOUT_S)


def fio_argv(path: str, block_size: str, *, seconds: int) -> list[str]:
    argv = ["fio", "--name=rate", f"--filename={path}", "--rw=randread", f"--bs={block_size}"]
    argv += ["--direct=1", "--ioengine=libaio", "--iodepth=16", "--numjobs=2", "--group_reporting"]
    return [*argv, "--time_based", f"--runtime={seconds}", "--output-format=json"]


def measured(path: str, block_size: str, *, seconds: int) -> dict[str, Any]:
    done = subprocess.run(
        fio_argv(path, block_size, seconds=seconds), capture_output=True, text=True, timeout=120, check=True
    )
    read: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]["read"]
    return read


@pytest.mark.emulated("a clock that ticks as a node's does")
def test_no_more_passes_than_the_limits_allow(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        attachment = attach(shared, image, queues=2, throttle=limits(iops=200))
        assert attachment.throttle == limits(iops=200)
        assert 120 < measured(attachment.path, "4k", seconds=5)["iops"] < 220
        set_throttle(shared, limits(bytes_per_s=2 * MIB))
        assert MIB < measured(attachment.path, "64k", seconds=5)["bw_bytes"] < 2.4 * MIB
        stats = inspect(shared).stats
        assert stats.throttled > 100
        assert stats.throttled_s > 1
        assert 0 < stats.data_max_bytes < stats.bounce_bytes
        detach(shared)


def test_a_limit_is_lifted_while_requests_wait_for_it(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        attachment = attach(shared, image, throttle=limits(iops=1, burst_s=0.01))
        argv = ["dd", f"if={attachment.path}", "of=/dev/null", "bs=4k", "count=200", "iflag=direct"]
        with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as reader:
            wait_until(lambda: inspect(shared).stats.throttled > 1, "a request that waits")
            began = time.monotonic()
            set_throttle(shared, limits())
            assert reader.wait(60) == 0
            assert time.monotonic() - began < 60  # 200 s at one a second
        assert inspect(shared).attachment.throttle == limits()
        detach(shared)


def test_a_throttled_volume_detaches_and_its_limits_survive_a_restart_of_the_agent(
    own: RunningAgent, image: Path
):
    before = traces(own)
    attachment = attach(own, image, throttle=limits(iops=1, burst_s=0.01))
    argv = ["dd", f"if={attachment.path}", "of=/dev/null", "bs=4k", "count=20", "iflag=direct"]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as reader:
        wait_until(lambda: inspect(own).stats.throttled > 1, "a request that waits")
        assert own.stop() == 0
        own.start()
        assert inspect(own).attachment.throttle == limits(iops=1, burst_s=0.01)
        quiesce = agent_pb2.QuiesceRequest(volume_id=VOLUME, hold_s=1)
        own.stub.Quiesce(quiesce, timeout=CALL_TIMEOUT_S)  # no wait for tokens
        assert inspect(own).stats.in_flight == 0
        set_throttle(own, limits())
        assert reader.wait(60) == 0
    detach(own)
    wait_until(lambda: traces(own).disks == before.disks, "the end of the disk")


def test_inspect_tells_latencies_and_the_throttle_command_changes_what_is_named(
    shared: RunningAgent, image: Path
):
    def command(*argv: str) -> Any:
        words = [*argv, "--run-dir", shared.run_dir, "--output", "json", VOLUME]
        return json.loads(tool("csi-vduse", "volume", *words))[0]

    with leaves_nothing(shared):
        attachment = attach(shared, image, throttle=limits(iops=5000))
        measured(attachment.path, "4k", seconds=1)
        changed = command("throttle", "--bandwidth", "8M")
        assert (changed["max_iops"], changed["max_bandwidth"]) == (5000, 8 * MIB)
        read = command("inspect")["read"]
        assert 0 < read["p50_us"] <= read["p99_us"] <= read["p99.9_us"] <= read["max_us"]
        detach(shared)
