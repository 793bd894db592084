"""A running `csi-vduse export --vhost-user`, seen from outside: its socket, its log, its end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

STOP_TIMEOUT_S = 60


class Exported:
    """The process; ``start`` may be called again after ``kill``, as a service manager would."""

    def __init__(self, folder: Path, backend: str, *options: str) -> None:
        self.socket = folder / "disk.sock"
        self.log = folder / "export.log"
        program = Path(sys.executable).parent / "csi-vduse"
        self._argv = [
            *(str(program), "--log-level", "DEBUG", "export", "--vhost-user", str(self.socket)),
            *(*options, "--backend", backend, "a-disk"),
        ]
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Exported:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._argv, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        assert line == str(self.socket), self.log.read_text()
        return self

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def stop(self) -> int:
        """End it as a service manager does; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(STOP_TIMEOUT_S)

    def kill(self) -> None:
        if self.process is not None and self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_TIMEOUT_S)
        if self.process is not None and self.process.stdout is not None:
            self.process.stdout.close()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace")
