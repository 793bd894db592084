"""How long a new worker takes from the fork of a pre-imported process to its first answer; prints milliseconds.

A program of its own, because only a process with a single thread may fork workers (agent/spawner.py). The
median of several; the engine's part, up to its first request, is in bench/instructions.py.
"""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from pathlib import Path

from csi_vduse.agent.spawner import fork_worker
from csi_vduse.dataplane import channel
from csi_vduse.dataplane.worker import run_worker

_STARTS = 11


def main() -> None:
    """Start some workers, one after the other, and end each."""
    gc.freeze()  # as the spawner does
    with tempfile.TemporaryDirectory(prefix="bench-start-") as folder:
        print(statistics.median(_start_ms(Path(folder) / str(number)) for number in range(_STARTS)))


def _start_ms(listen_path: Path) -> float:
    started = time.monotonic()
    worker = fork_worker(run_worker, str(listen_path))
    with worker.control:
        channel.send(worker.control, {"op": "ping"})
        channel.receive(worker.control)
        took_ms = (time.monotonic() - started) * 1e3
    os.kill(worker.pid, 9)
    os.waitpid(worker.pid, 0)
    os.close(worker.pidfd)
    return took_ms


if __name__ == "__main__":
    main()
