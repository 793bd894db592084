"""A worker process that serves nothing: `python worker.py FD LISTEN_PATH [FAULT]`, and a source of those.

It speaks the real channel, keeps the device that it is given open, and ends on "stop". Faults: "refuse"
(start is answered with an error), "foreign log" (with another one), "die" (killed while starting), "mute"
(never answers start), "deaf" (never resizes).
"""

from __future__ import annotations

import os
import selectors
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_vduse.dataplane import channel
from csi_vduse.errors import DataLoss, FailedPrecondition


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    fault = sys.argv[3] if len(sys.argv) > 3 else ""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    Path(sys.argv[2]).unlink(missing_ok=True)
    listener.bind(sys.argv[2])
    listener.listen()
    selector = selectors.DefaultSelector()
    selector.register(listener, selectors.EVENT_READ)
    selector.register(control, selectors.EVENT_READ)
    kept: list[int] = []
    while True:
        for key, _ in selector.select():
            if key.fileobj is listener:
                selector.register(listener.accept()[0], selectors.EVENT_READ)
                continue
            peer: Any = key.fileobj
            try:
                message, fds = channel.receive(peer)
            except Exception:  # noqa: BLE001 - the peer is gone
                selector.unregister(peer)
                peer.close()
                continue
            kept += fds
            answer = _answer(message, fault)
            if answer is not None:
                channel.send(peer, answer)
            if message["op"] == "stop":
                return


def _answer(message: dict[str, Any], fault: str) -> dict[str, Any] | None:
    match message["op"], fault:
        case "start", "refuse":
            return channel.error_answer(FailedPrecondition("the image is missing", hint="make it"))
        case "start", "foreign log":
            return channel.error_answer(DataLoss("the in-flight log is not of this device"))
        case "start", "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case ("start", "mute") | ("resize", "deaf"):
            return None
        case "stats", _:
            read = {
                "operation": "read",
                "count": 3,
                "bytes": 4096,
                "errors": 1,
                "latency_sum_s": 0.5,
                "latency_max_s": 0.25,
                "latency": [0, 2, 1],
            }
            return {"ok": True, "operations": [read], "in_flight": 2, "features": 7, "device_status": 15}
    return {"ok": True}


@dataclass
class FakeWorkers:
    """A WorkerSource; every process that it started is ended by `close`."""

    fault: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def spawn(self, listen_path: Path) -> Any:
        from csi_vduse.agent.workers import Worker

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(listen_path), self.fault],
                pass_fds=[theirs.fileno()],
            )
        self.processes.append(process)
        return Worker(process.pid, os.pidfd_open(process.pid), ours, str(listen_path))

    def running(self) -> int:
        return sum(process.poll() is None for process in self.processes)

    def wait_for_none(self) -> None:
        deadline = time.monotonic() + 10
        while self.running():
            assert time.monotonic() < deadline, "workers go on running"
            time.sleep(0.01)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
