"""Pauses without a VM: the engine and its in-flight log behind vhost-user sockets, one or twenty of them.

Whoever kills or replaces servers does it to all of them at once; the writer is on the last of them, which comes back
last. There is no agent between: what an agent does in the VM is done by bench/pause_servers.py.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import pause, results
from bench.pause import HANDOVER, KILL, NOTHING, Event, Series
from bench.servers import BenchError
from lab.paths import CHECKOUT

VOLUMES = (1, 20)
_IMAGE_BYTES = 16 << 20
_REST_S = 0.1
_TIMEOUT_S = 60.0
_TMPFS = Path("/dev/shm")


def measure(count: int, wanted: str) -> dict[str, Any]:
    """Measure each event `count` times; wanted: see pause.measure. Returns the raw figures."""
    found: list[Series] = []
    for volumes in VOLUMES:
        with _servers(volumes) as servers:
            argv = [sys.executable, "-m", "bench.pause_frontend", str(servers.folder / f"{volumes - 1}.sock")]
            with pause.writing(argv) as writer:
                found += pause.measure(writer, servers.events(), wanted=wanted, volumes=volumes, count=count)
    return pause.merged(results.load("pause-native"), found, results.conditions(file_system="tmpfs"))


class _Servers:
    """The keeper's process, and which servers it has told of."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self._count = count
        self._pids: dict[int, int] = {}
        self._changed = threading.Condition()
        argv = [sys.executable, "-m", "bench.pause_servers", str(folder), str(count)]
        self._keeper = subprocess.Popen(
            argv, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=CHECKOUT
        )
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def events(self) -> list[Event]:
        """What can happen to them."""
        return [
            Event(NOTHING, lambda: None, _REST_S),
            Event(KILL, self._kill, _REST_S),
            Event(HANDOVER, self._hand_over, _REST_S),
        ]

    def wait(self, before: dict[int, int]) -> None:
        """Wait until each server is another than it was.

        Raises BenchError if that takes too long.
        """

        def all_new() -> bool:
            return len(self._pids) == self._count and not before.items() & self._pids.items()

        with self._changed:
            if not self._changed.wait_for(all_new, _TIMEOUT_S):
                raise BenchError(f"servers did not come back within {_TIMEOUT_S:g} s")

    def close(self) -> None:
        """End them all."""
        self._keeper.terminate()
        self._keeper.wait(_TIMEOUT_S)
        self._reader.join()

    def _kill(self) -> None:
        before = dict(self._pids)
        for pid in before.values():
            os.kill(pid, signal.SIGKILL)
        self.wait(before)

    def _hand_over(self) -> None:
        before = dict(self._pids)
        self._keeper.send_signal(signal.SIGUSR1)
        self.wait(before)

    def _read(self) -> None:
        assert self._keeper.stdout is not None  # noqa: S101 - it is a pipe
        with self._keeper.stdout as lines:
            for line in lines:
                _, number, pid = line.split()
                with self._changed:
                    self._pids[int(number)] = int(pid)
                    self._changed.notify_all()


@contextmanager
def _servers(count: int) -> Iterator[_Servers]:
    with tempfile.TemporaryDirectory(prefix="bench-pause-", dir=_TMPFS) as name:
        for number in range(count):
            with (Path(name) / f"{number}.raw").open("wb") as image:
                image.truncate(_IMAGE_BYTES)
        servers = _Servers(Path(name), count)
        try:
            servers.wait({})
            yield servers
        finally:
            servers.close()
