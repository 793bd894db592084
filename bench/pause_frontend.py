"""The writer of bench/pauses.c for a vhost-user disk: a front-end that reconnects when its server is gone.

    python -m bench.pause_frontend SOCKET

Prints what that one prints. It keeps the in-flight log and gives it to the next server, as QEMU does; the driver
in it is the simplest there is: one queue, a request of two descriptors, an interrupt for every batch.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import struct
import sys
import time
from pathlib import Path

from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.vhost_user.frontend import AVAIL, DATA, DESC, GUEST, SIZE, USED, Frontend

_BLOCK = 4096
_BLOCKS = 2048
_PAUSE_NS = 1_000_000
_MARK_NS = 100_000_000
_RECONNECT_S = 0.001
_SLOT = 0x2000
_STATUS = _SLOT - 1
_INDEX = 1 << 16


class PauseFrontend(Frontend):
    """A front-end whose guest does nothing but write."""

    def __init__(self, path: Path) -> None:
        self._path = path
        super().__init__(_connect(path))
        self._log = (b"", -1)
        self._seen = 0
        self._next_block = 0
        self.written = 0

    def begin(self) -> None:
        """Set the disk up, the first time or again with the requests that are under way."""
        self.negotiate()
        self.give_memory()
        description, log_fd = self._log
        if log_fd < 0:
            self.send(Request.GET_INFLIGHT_FD, struct.pack("=QQHH4x", 0, 0, 1, SIZE))
            self._log = self.receive_fd()
        elif not self.acked(Request.SET_INFLIGHT_FD, description, (log_fd,)):
            raise RuntimeError("the server does not take the in-flight log")
        self.give_ring(base=self.used())
        self.enable()

    def begin_again(self) -> None:
        """Find the next server; returns when it serves."""
        while True:
            try:
                self.reconnect(_connect(self._path))
                self.begin()
            except (OSError, EOFError):
                time.sleep(_RECONNECT_S)  # it died while it began
            else:
                return

    def write(self, head: int) -> None:
        """Ask for the next block to be written, by the descriptors from head on."""
        at = DATA + head * _SLOT
        self.memory[at : at + 16] = struct.pack("<IIQ", 1, 0, self._next_block % _BLOCKS * _BLOCK // 512)
        self._next_block += 1
        chain = struct.pack("<QIHH", GUEST + at, 16 + _BLOCK, 1, head + 1)
        chain += struct.pack("<QIHH", GUEST + at + _STATUS, 1, 2, 0)
        self.memory[at + _STATUS] = 0xFF
        self.memory[DESC + 16 * head : DESC + 16 * head + len(chain)] = chain
        slot = AVAIL + 4 + 2 * (self.submitted % SIZE)
        self.memory[slot : slot + 2] = struct.pack("<H", head)
        self.submitted = (self.submitted + 1) % _INDEX
        self.memory[AVAIL + 2 : AVAIL + 4] = struct.pack("<H", self.submitted)

    def completed(self) -> list[int]:
        """The heads of what has come back since the last look; raises RuntimeError for one that failed."""
        heads = []
        used = self.used()
        while self._seen != used:
            slot = USED + 4 + 8 * (self._seen % SIZE)
            (head,) = struct.unpack("<I", self.memory[slot : slot + 4])
            status = self.memory[DATA + head * _SLOT + _STATUS]
            if status:
                raise RuntimeError(f"a write came back with status {status}")
            heads.append(head)
            self._seen = (self._seen + 1) % _INDEX
        self.written += len(heads)
        return heads


def _connect(path: Path) -> socket.socket:
    while True:
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            time.sleep(_RECONNECT_S)
        else:
            return sock


def main(path: Path) -> None:
    """Write until SIGTERM."""
    stopped: list[int] = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
    guest = PauseFrontend(path)
    guest.begin()
    for head in range(0, SIZE, 2):
        guest.write(head)
    os.eventfd_write(guest.kick, 1)
    last = told = time.monotonic_ns()
    while not stopped:
        readable, _, _ = select.select([guest.call, guest.sock.fileno()], [], [], 1.0)
        if guest.sock.fileno() in readable:
            guest.begin_again()
        if guest.call in readable:
            os.eventfd_read(guest.call)
        heads = guest.completed()
        if not heads:
            continue
        now = time.monotonic_ns()
        if now - last >= _PAUSE_NS or now - told >= _MARK_NS:
            print(last, now, flush=True)
            told = now
        last = now
        for head in heads:
            guest.write(head)
        os.eventfd_write(guest.kick, 1)
    print(f"written {guest.written}", flush=True)


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    except RuntimeError as failure:
        print(f"error: {failure}", flush=True)
        sys.exit(1)
