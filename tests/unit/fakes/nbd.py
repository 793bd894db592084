"""An NBD server of one connection that says what a script has it say: for the client's side of the handshake."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from csi_vduse.dataplane.backend_spec import NbdBackend

GREETING = b"NBDMAGICIHAVEOPT" + struct.pack(">H", 3)
MAGIC = 0x3E889045565A9
ACK, INFO, UNSUP, TLS_REQUIRED, UNKNOWN = 1, 3, 1 | 1 << 31, 5 | 1 << 31, 6 | 1 << 31
EXPORT_NAME, ABORT, STARTTLS, GO, STRUCTURED, EXTENDED = 1, 2, 5, 7, 8, 11
FLAGS = 0x1ED
MIB = 1 << 20

Script = Callable[[socket.socket], None]


@contextlib.contextmanager
def served(folder: Path, script: Script) -> Iterator[NbdBackend]:
    path = folder / "s"
    path.unlink(missing_ok=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with contextlib.suppress(OSError), listener.accept()[0] as connection:
                connection.settimeout(10)
                script(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield NbdBackend(f"nbd+unix:///disk?socket={path}")
        finally:
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise ConnectionResetError
        data += piece
    return data


def option(connection: socket.socket) -> tuple[int, bytes]:
    _, number, length = struct.unpack(">QII", receive(connection, 16))
    return number, receive(connection, length)


def reply(number: int, kind: int, data: bytes = b"") -> bytes:
    return struct.pack(">QIII", MAGIC, number, kind, len(data)) + data


def export(size: int = MIB, flags: int = FLAGS) -> bytes:
    return reply(GO, INFO, struct.pack(">HQH", 0, size, flags))


def sizes(minimum: int, preferred: int, maximum: int) -> bytes:
    return reply(GO, INFO, struct.pack(">HIII", 3, minimum, preferred, maximum))


def answering(answers: dict[int, bytes]) -> Script:
    def script(connection: socket.socket) -> None:
        connection.sendall(GREETING)
        receive(connection, 4)
        while True:
            number, _ = option(connection)
            connection.sendall(answers.get(number, reply(number, UNSUP, b"no such thing")))

    return script
