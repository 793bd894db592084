"""A disk, behind NBD, that holds one write until it is told to let it go, and does all others meanwhile.

What a slow disk does to one request in a thousand, when the test wants it. Simple replies; any number of connections.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.unit.fakes.nbd import ACK, GO, GREETING, INFO, UNSUP, option, receive, reply

_FLAGS = 1 | 1 << 2  # it says which it has, and flushes
_READ, _WRITE, _DISCONNECT = 0, 1, 2
_ANSWER = 0x67446698


class HeldDisk:
    """Serves at `path` while entered.

    Args:
        path: of a unix socket.
        size_bytes: of the disk.
        held: the first write that begins with this is the one; `holds` is set when it has come.
    """

    def __init__(self, path: Path, size_bytes: int, held: bytes) -> None:
        self.path = path
        self.holds = threading.Event()
        self._content = bytearray(size_bytes)
        self._held = held
        self._release = threading.Event()
        self._listener = socket.socket(socket.AF_UNIX)

    def __enter__(self) -> Self:
        self._listener.bind(str(self.path))
        self._listener.listen()
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.release()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def release(self) -> None:
        """Let the write go."""
        self._release.set()

    def content(self, length: int) -> bytes:
        """The first bytes, as they are on the disk now."""
        return bytes(self._content[:length])

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.sendall(GREETING)
            receive(connection, 4)
            while True:
                number, _ = option(connection)
                if number == GO:
                    break
                connection.sendall(reply(number, UNSUP))
            export = struct.pack(">HQH", 0, len(self._content), _FLAGS)
            connection.sendall(reply(GO, INFO, export) + reply(GO, ACK))
            sending = threading.Lock()
            while True:
                header = receive(connection, 28)
                _, _, command, cookie, offset, length = struct.unpack(">IHHQQI", header)
                data = receive(connection, length) if command == _WRITE else b""
                if command == _DISCONNECT:
                    return
                if command == _WRITE and not self.holds.is_set() and data.startswith(self._held):
                    self.holds.set()
                    late = (connection, sending, cookie, offset, data)
                    threading.Thread(target=self._write_late, args=late, daemon=True).start()
                    continue
                self._content[offset : offset + len(data)] = data
                found = bytes(self._content[offset : offset + length]) if command == _READ else b""
                with sending:
                    connection.sendall(struct.pack(">IIQ", _ANSWER, 0, cookie) + found)

    def _write_late(
        self, connection: socket.socket, sending: threading.Lock, cookie: int, offset: int, data: bytes
    ) -> None:
        self._release.wait()
        self._content[offset : offset + len(data)] = data
        with sending, contextlib.suppress(OSError):
            connection.sendall(struct.pack(">IIQ", _ANSWER, 0, cookie))
