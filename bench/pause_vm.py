"""Pauses in the VM: a disk of virtio_vdpa under the agent, one volume or twenty of them, images on tmpfs.

Workers are killed all at once, and the writer is on the volume that was attached last. An agent that is killed comes
back while the writer goes on. Between two kills each worker serves for longer than an agent takes for a sign of a
loop (csi_vduse/agent/revive.py), or the pause measured would be the agent's patience.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import grpc

from bench import pause, results
from bench.pause import AGENT_KILL, COMPUTING, HANDOVER, KILL, NOTHING, UPGRADE, Event, Series
from bench.servers import CSI_VDUSE, BenchError, tool
from csi_vduse.agent.revive import CALM_S
from csi_vduse.proto import agent_pb2, agent_pb2_grpc
from lab.paths import CHECKOUT

VOLUMES = (1, 20)
_IMAGE_BYTES = 16 << 20
_REST_S = 0.2
_TIMEOUT_S = 240.0
_POLL_S = 0.02
# At most: the shortest start that was seen counts, because a later one waits before it computes.
_AGENT_START_S = 5.0


def measure(count: int, wanted: str, folder: Path) -> dict[str, Any]:
    """Measure each event `count` times; wanted: see pause.measure. Returns the raw figures."""
    tool("modprobe", "-a", "vduse", "virtio-vdpa")
    found: list[Series] = []
    with tempfile.TemporaryDirectory(prefix="bench-pause-", dir="/run") as name:
        program = Path(name) / "pauses"
        tool("cc", "-O2", "-o", str(program), str(CHECKOUT / "bench/pauses.c"), "-luring")
        for volumes in VOLUMES:
            with (
                _node(Path(name) / str(volumes), folder, volumes) as node,
                pause.writing([str(program), node.disk, str(_IMAGE_BYTES)]) as writer,
            ):
                found += pause.measure(writer, node.events(), wanted=wanted, volumes=volumes, count=count)
    return pause.merged(results.load("pause"), found, results.conditions(file_system="tmpfs"))


class _Node:
    """A running agent with volumes attached."""

    def __init__(self, run_dir: Path, volumes: int) -> None:
        self._argv = [CSI_VDUSE, "agent", "--run-dir", str(run_dir), "--max-volumes", str(volumes + 1)]
        self._spawner = self._start()
        self._socket = run_dir / "agent.sock"
        self._channel: grpc.Channel | None = None
        self._volume_ids: list[str] = []
        self._agent_start_s = _AGENT_START_S
        self.disk = ""

    def events(self) -> list[Event]:
        """What can happen to it."""
        return [
            Event(NOTHING, lambda: None, _REST_S),
            Event(AGENT_KILL, self._kill_agent, _REST_S),
            Event(COMPUTING, self._compute, _REST_S),
            Event(HANDOVER, self._hand_over, _REST_S),
            Event(UPGRADE, self._upgrade, _REST_S),
            Event(KILL, self._kill_workers, CALM_S),
        ]

    def attach(self, image: Path) -> None:
        """Attach an image as one more volume; the last one is the writer's."""
        volume_id = image.stem
        request = agent_pb2.AttachRequest(
            volume_id=volume_id,
            backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image))),
            capacity_bytes=_IMAGE_BYTES,
            bus=agent_pb2.BUS_VIRTIO_VDPA,
            queues=1,
        )
        self.disk = self._stub().Attach(request, timeout=_TIMEOUT_S).path
        self._volume_ids.append(volume_id)

    def detach_all(self) -> None:
        """Detach every volume."""
        while self._volume_ids:
            request = agent_pb2.DetachRequest(volume_id=self._volume_ids.pop())
            self._stub().Detach(request, timeout=_TIMEOUT_S)

    def wait_until_ready(self) -> None:
        """Wait until the agent answers.

        Raises BenchError if that takes too long.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        while time.monotonic() < deadline:
            with contextlib.suppress(grpc.RpcError):
                self._stub().Probe(agent_pb2.ProbeRequest(), timeout=_TIMEOUT_S)
                return
            self._disconnect()
            time.sleep(_POLL_S)
        raise BenchError("the agent does not answer")

    def close(self) -> None:
        """End it."""
        self._disconnect()
        self._spawner.terminate()
        self._spawner.wait(_TIMEOUT_S)

    def _start(self, *options: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([*self._argv, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _compute(self) -> None:
        """Compute as much as a start of the agent does, which is two processes: itself and its netlink helper."""
        argv = ["timeout", f"{self._agent_start_s:.1f}", "yes"]
        for process in [subprocess.Popen(argv, stdout=subprocess.DEVNULL) for _ in range(2)]:
            process.wait()

    def _kill_agent(self) -> None:
        children = Path(f"/proc/{self._spawner.pid}/task/{self._spawner.pid}/children").read_text().split()
        (agent,) = [
            int(child) for child in children if os.getsid(int(child)) != int(child)
        ]  # workers lead a session
        killed = time.monotonic()
        os.kill(agent, signal.SIGKILL)
        self._disconnect()
        self.wait_until_ready()
        self._agent_start_s = min(self._agent_start_s, time.monotonic() - killed)

    def _hand_over(self) -> None:
        for volume_id in self._volume_ids:
            request = agent_pb2.HandoverRequest(volume_id=volume_id)
            self._stub().Handover(request, timeout=_TIMEOUT_S)

    def _upgrade(self) -> None:
        """Another agent beside the first takes everything over, and then the first container is gone."""
        before = self._workers()
        last, self._spawner = self._spawner, self._start("--take-over")
        self._wait_for_others_than(before)
        last.kill()
        last.wait()

    def _kill_workers(self) -> None:
        before = self._workers()
        for pid in before:
            os.kill(pid, signal.SIGKILL)
        self._wait_for_others_than(before)

    def _wait_for_others_than(self, before: set[int]) -> None:
        """Wait until each volume has another worker than it had."""
        deadline = time.monotonic() + _TIMEOUT_S
        now: set[int] = set()
        while now & before or len(now) < len(before):
            if time.monotonic() > deadline:
                raise BenchError("workers did not come back")
            time.sleep(_POLL_S)
            try:
                now = self._workers()
            except grpc.RpcError:  # the agent is being replaced
                self._disconnect()

    def _workers(self) -> set[int]:
        listed = self._stub().List(agent_pb2.ListRequest(), timeout=_TIMEOUT_S).attachments
        return {each.worker_pid for each in listed if each.state == agent_pb2.STATE_ATTACHED}

    def _stub(self) -> agent_pb2_grpc.AgentStub:
        if self._channel is None:
            self._channel = grpc.insecure_channel(f"unix:{self._socket}")
        return agent_pb2_grpc.AgentStub(self._channel)

    def _disconnect(self) -> None:
        if self._channel is not None:
            self._channel.close()
            self._channel = None


@contextmanager
def _node(run_dir: Path, folder: Path, volumes: int) -> Iterator[_Node]:
    with ExitStack() as stack:
        images = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pause-", dir=folder)))
        node = _Node(run_dir, volumes)
        stack.callback(node.close)
        node.wait_until_ready()
        for number in range(volumes):
            image = images / f"pause-{number}.raw"
            with image.open("wb") as file:
                file.truncate(_IMAGE_BYTES)
            node.attach(image)
        yield node
        node.detach_all()
