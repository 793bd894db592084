"""A backend that can misbehave: an image on a file system of tests/chaos/tools/faultfs.c."""

from __future__ import annotations

import contextlib
import mmap
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from lab.paths import CHECKOUT
from tests.chaos.vm.load import make_image
from tests.vm.conftest import wait_until
from tests.vm.exports import tool

_PROGRAM = CHECKOUT / ".cache/chaos/faultfs"
_WORD = struct.Struct("=i")
_ERROR, _DELAY_MS, _HOLD, _WAITING = (number * _WORD.size for number in range(4))


class FaultyBackend:
    """The image, and what is wrong with it."""

    def __init__(self, image: Path, control: mmap.mmap) -> None:
        self.image = image
        self._control = control

    def fail(self, error: int) -> None:
        """Answer requests with this errno; 0: answer them well again. ENOSPC is for writes only."""
        _WORD.pack_into(self._control, _ERROR, error)

    def be_late(self, delay_s: float) -> None:
        """Do every request so much later; 0: at once again, those that wait among them."""
        _WORD.pack_into(self._control, _DELAY_MS, round(delay_s * 1000))

    def hold(self, *, on: bool) -> None:
        """Answer nothing, or everything."""
        _WORD.pack_into(self._control, _HOLD, on)

    def mend(self) -> None:
        """Nothing is wrong any more."""
        self._control[:_WAITING] = bytes(_WAITING)

    @property
    def waiting(self) -> int:
        """Requests that have come and were not answered."""
        return int(_WORD.unpack_from(self._control, _WAITING)[0])


@contextlib.contextmanager
def faulty_backend(folder: Path) -> Iterator[FaultyBackend]:
    """Mount one; its content is in `backing.raw`."""
    point, control = folder / "faulty", folder / "control"
    point.mkdir()
    make_image(folder / "backing.raw")
    control.write_bytes(bytes(4 * _WORD.size))
    server = subprocess.Popen([_PROGRAM, point, folder / "backing.raw", control])
    try:
        wait_until((point / "image").exists, "mount of the faulty file system")
        with control.open("r+b") as file, mmap.mmap(file.fileno(), 4 * _WORD.size) as words:
            backend = FaultyBackend(point / "image", words)
            try:
                yield backend
            finally:
                backend.mend()
        tool("umount", point)
        assert server.wait(60) == 0
    finally:
        server.kill()
        server.wait()
