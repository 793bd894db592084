"""A worker process that serves nothing: `python worker.py FD LISTEN_PATH [FAULT]`, and a source of those.

It speaks the real channel, keeps the device that it is given open until it is to release it, ends on "stop", and, when
it serves nothing, with any of its connections, as the real one does (tests/unit/dataplane/test_worker.py). Faults:
"refuse" (start is answered with an error), "foreign log" and "given up" (with others), "die" (killed while starting),
"mute" (never answers start), "deaf" (never resizes), "old log" (does not read the log), "slow" (does not drain),
"stuck" (never answers release), "broken" (its device is), "ancient" (of a protocol without handover), "full" (requests
wait).
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

from csi_vduse.dataplane import channel, versions
from csi_vduse.errors import DataLoss, DeviceBroken, FailedPrecondition


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
    kept: list[int] = []  # of a device that it serves
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
                if not kept:
                    return
                continue
            answer = _answer(message, fault, started=bool(kept))
            good = answer is not None and answer["ok"]
            if message["op"] == "start" and good:
                kept, fds = fds, []
            if message["op"] == "release" and good and answer["released"]:
                kept, fds = [], kept
            for fd in fds:
                os.close(fd)
            if answer is not None:
                channel.send(peer, answer)
            if message["op"] == "stop":
                return


def _answer(message: dict[str, Any], fault: str, *, started: bool) -> dict[str, Any] | None:
    operation = str(message["op"])
    if operation == "ping":
        return {"ok": True, **({} if fault == "ancient" else versions.hello(started=started))}
    if operation in {"release", "stats"} and not started:
        return channel.error_answer(FailedPrecondition("this worker has not been started"))
    if operation == "start" and started:
        return channel.error_answer(FailedPrecondition("this worker serves a device already"))
    if (operation, fault) in {("start", "mute"), ("resize", "deaf"), ("release", "stuck")}:
        return None
    if (operation, fault) == ("start", "die"):
        os.kill(os.getpid(), signal.SIGKILL)
    error = _ERRORS.get((operation, fault))
    if error is not None and message.get("backend") != {"kind": "error"}:  # which needs no image
        return channel.error_answer(error)
    answers = {
        "stats": {
            "broken": fault == "broken",
            "operations": [_READ],
            "in_flight": 2,
            "features": 7,
            "device_status": 15,
            "capacity_bytes": 64 << 20,
            "waiting": _WAITING if fault == "full" else "",
        },
        "release": {"released": fault != "slow" or message.get("abandon", False)},
    }
    return {"ok": True, **answers.get(operation, {})}


_WAITING = "2 requests wait for the backend: the last write failed with ENOSPC"
_ERRORS = {
    ("start", "refuse"): FailedPrecondition("the image is missing", hint="make it"),
    ("start", "foreign log"): DataLoss("the in-flight log is not of this device"),
    ("start", "given up"): DeviceBroken("the kernel has given the device up"),
    ("prepare", "old log"): DataLoss("the in-flight log is of version 2"),
}
_READ = {
    "operation": "read",
    "count": 3,
    "bytes": 4096,
    "errors": 1,
    "latency_sum_s": 0.5,
    "latency_max_s": 0.25,
    "latency": [0, 2, 1],
}


@dataclass
class FakeWorkers:
    """A WorkerSource; every process that it started is ended by `close`."""

    fault: str = ""
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    async def spawn(self, listen_path: Path) -> Any:
        from csi_vduse.agent.workers import Worker
        from csi_vduse.dataplane.versions import hello_from_json

        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno()), str(listen_path), self.fault],
                pass_fds=[theirs.fileno()],
            )
        self.processes.append(process)
        hello = hello_from_json({} if self.fault == "ancient" else versions.hello(started=False))
        return Worker(process.pid, os.pidfd_open(process.pid), ours, str(listen_path), hello)

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
