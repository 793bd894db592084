"""Keeps new vDPA devices from being given to the wrong driver: the bus's `drivers_autoprobe` switch.

A device cannot name its driver before it is on the bus, and once it is there the first loaded driver takes
it, so that the host would read a VM's disk. Therefore autoprobe is off while a device is added, and back on
before anything else happens.

Kept true:
- One process on the machine at a time holds the switch: flock on the switch itself, which the kernel drops
  when the process dies, however it dies.
- Whoever turns it off has written a marker before. A marker found by the next holder of the lock means that
  its writer was killed half-way: the switch is turned on again. Without a marker, off is somebody else's
  choice and stays.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.errors import DeadlineExceeded

_RETRY_S = 0.01


@dataclass(frozen=True)
class Autoprobe:
    """The switch of one bus.

    Args:
        switch: /sys/bus/vdpa/drivers_autoprobe.
        marker: file that exists while we have turned it off; its directory exists.
        lock_timeout_s: how long to wait for another process.
    """

    switch: Path
    marker: Path
    lock_timeout_s: float = 30.0

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """Have autoprobe off inside, and as it was before afterwards.

        Raises:
            DeadlineExceeded: another process holds the switch for too long.
            OSError: the kernel refused (not root, bus not there).
        """
        with self._locked():
            self._mend()
            if self._read() == "0":
                yield
                return
            self.marker.touch()
            try:
                self._write("0")
                yield
            finally:
                self._mend()

    def recover(self) -> bool:
        """Turn autoprobe on again if its last holder was killed; returns whether that was so.

        Raises:
            DeadlineExceeded: the holder is alive (or stuck in the kernel): then off is still right.
        """
        if not self.marker.exists():
            return False
        with self._locked():
            return self._mend()

    def _mend(self) -> bool:
        if not self.marker.exists():
            return False
        self._write("1")
        self.marker.unlink()
        return True

    def _read(self) -> str:
        return self.switch.read_text().strip()

    def _write(self, value: str) -> None:
        self.switch.write_text(value)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        fd = os.open(self.switch, os.O_RDONLY | os.O_CLOEXEC)
        try:
            deadline = time.monotonic() + self.lock_timeout_s
            while True:
                try:
                    fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DeadlineExceeded(
                            f"another process has held {self.switch} for {self.lock_timeout_s:g} s",
                            hint="a vDPA device is stuck being added; see the kernel log",
                        ) from None
                    time.sleep(_RETRY_S)
            yield
        finally:
            os.close(fd)
