"""vhost-user servers under a keeper that replaces them: what spawner and agent are for VDUSE, without a kernel device.

    python -m bench.pause_servers FOLDER COUNT

Serves COUNT images FOLDER/N.raw at FOLDER/N.sock, each in a process forked from this one, which has imported all it
takes. One that dies is replaced at once. At SIGUSR1 each is replaced by plan: the next one is forked first and waits,
the old one is told to end, drains, and the next one begins. Prints `serving N PID` for each that serves.
Single-threaded, as a process that forks has to be.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from pathlib import Path

from csi_vduse import log
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.server import Server
from csi_vduse.errors import VduseError

_LOCKED_S = 0.001
_LOCKED_TIMEOUT_S = 10.0


def _serve(folder: Path, number: int) -> None:
    """Serve one image until told to end."""
    image = folder / f"{number}.raw"
    spec = DeviceSpec(f"pause-{number}", image.stat().st_size, queues=1, queue_size=128)
    event_fd = os.eventfd(0, os.EFD_NONBLOCK)
    engine = _engine(image, spec, event_fd)
    server = Server(folder / f"{number}.sock", engine, spec, event_fd)
    server.run(lambda: _say(f"serving {number} {os.getpid()}"))
    engine.close()


def _say(line: str) -> None:
    """Print it with one write: twenty processes have the same pipe, and Python may be told not to buffer."""
    os.write(sys.stdout.fileno(), f"{line}\n".encode())


def _engine(image: Path, spec: DeviceSpec, event_fd: int) -> Engine:
    """Open the image; what its last server had in flight may keep it locked for a moment."""
    deadline = time.monotonic() + _LOCKED_TIMEOUT_S
    while True:
        try:
            return Engine(
                backend=FileBackend(image),
                capacity_bytes=spec.capacity_bytes,
                block_size_bytes=spec.block_size_bytes,
                max_queues=spec.queues,
                read_only=False,
                serial=spec.name,
                event_fd=event_fd,
            )
        except VduseError:
            if time.monotonic() > deadline:
                raise
            time.sleep(_LOCKED_S)


class Keeper:
    """The servers by process number, and those that wait to take one's place."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._numbers: dict[int, int] = {}
        self._next: dict[int, tuple[int, int]] = {}

    def start(self, number: int) -> None:
        """Fork a server that begins at once."""
        pid, begin_fd = self._fork(number)
        os.close(begin_fd)
        self._numbers[pid] = number

    def replace_all(self) -> None:
        """Fork a successor of each that waits, and tell each to end."""
        for pid, number in self._numbers.items():
            self._next[pid] = self._fork(number)
            os.kill(pid, signal.SIGTERM)

    def run(self) -> None:
        """Replace who ends, as long as there is somebody."""
        while True:
            pid, _ = os.wait()
            number = self._numbers.pop(pid)
            if pid in self._next:
                successor, begin_fd = self._next.pop(pid)
                os.close(begin_fd)
                self._numbers[successor] = number
            else:
                self.start(number)

    def end(self) -> None:
        """Kill all."""
        for pid in [*self._numbers, *(pid for pid, _ in self._next.values())]:
            os.kill(pid, signal.SIGKILL)

    def _fork(self, number: int) -> tuple[int, int]:
        """Fork a server that begins when the descriptor returned is closed."""
        wait_fd, begin_fd = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(begin_fd)
            for _, other_fd in self._next.values():
                os.close(other_fd)  # or it would keep others from beginning
            for number_of_signal in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number_of_signal, signal.SIG_DFL)
            os.read(wait_fd, 1)
            code = 1
            try:
                _serve(self._folder, number)
                code = 0
            finally:
                os._exit(code)
        os.close(wait_fd)
        return pid, begin_fd


def main(folder: Path, count: int) -> None:
    """Serve until SIGTERM."""
    log.configure(level="ERROR", component="pause")
    keeper = Keeper(folder)
    gc.freeze()
    signal.signal(signal.SIGUSR1, lambda *_: keeper.replace_all())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    for number in range(count):
        keeper.start(number)
    try:
        keeper.run()
    finally:
        keeper.end()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
