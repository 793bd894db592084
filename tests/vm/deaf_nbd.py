"""An NBD server, with TLS or without, that can stop reading from its first client: its bytes stay in the kernels."""

from __future__ import annotations

import contextlib
import select
import socket
import ssl
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from tests.vm.nbd_servers import PORT

_OPTIONS, _REPLIES = 0x49484156454F5054, 0x3E889045565A9
_REQUEST, _REPLY = 0x25609513, 0x67446698
_STARTTLS, _GO = 5, 7
_ACK, _INFO, _UNSUP = 1, 3, 1 | 1 << 31
_READ, _WRITE, _GOODBYE = 0, 1, 2
_FLAGS = 0x65  # has flags, FLUSH, TRIM, WRITE_ZEROES; the last two do nothing
_RECEIVE_BYTES = 4096


class DeafServer:
    """Simple replies, one thread for each connection; `image` is what was written."""

    def __init__(self, size_bytes: int, keys: Path | None) -> None:
        self.image = bytearray(size_bytes)
        self.first_ended = threading.Event()
        self.connections = 0
        self._hears = threading.Event()
        self._hears.set()
        self._was_deaf = False
        self._context: ssl.SSLContext | None = None
        if keys is not None:
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            self._context.load_cert_chain(keys / "server-cert.pem", keys / "server-key.pem")

    def stop_hearing(self) -> None:
        """Read nothing more from the first client from its next command on."""
        self._was_deaf = True
        self._hears.clear()

    def hear_again(self) -> None:
        """Read on, if there is anything, and do what it says."""
        self._hears.set()

    def accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._serve, args=(connection, self.connections), daemon=True).start()
                self.connections += 1

    def _serve(self, connection: socket.socket, number: int) -> None:
        with contextlib.suppress(OSError, EOFError), contextlib.ExitStack() as sockets:
            sockets.enter_context(connection)
            encrypted = self._negotiate(connection, sockets)
            while self._serve_command(encrypted, number):
                pass
        if number == 0:
            self.first_ended.set()

    def _negotiate(self, connection: socket.socket, sockets: contextlib.ExitStack) -> socket.socket:
        connection.sendall(b"NBDMAGIC" + struct.pack(">QH", _OPTIONS, 3))
        _receive(connection, 4)
        while True:
            _, option, length = struct.unpack(">QII", _receive(connection, 16))
            _receive(connection, length)
            if option == _STARTTLS and self._context is not None:
                connection.sendall(struct.pack(">QIII", _REPLIES, option, _ACK, 0))
                connection = sockets.enter_context(self._context.wrap_socket(connection, server_side=True))
            elif option == _GO:
                export = struct.pack(">HQH", 0, len(self.image), _FLAGS)
                connection.sendall(struct.pack(">QIII", _REPLIES, option, _INFO, len(export)) + export)
                connection.sendall(struct.pack(">QIII", _REPLIES, option, _ACK, 0))
                return connection
            else:
                connection.sendall(struct.pack(">QIII", _REPLIES, option, _UNSUP, 0))

    def _serve_command(self, connection: socket.socket, number: int) -> bool:
        # It may be deaf by the time there is something; and then nothing leaves the kernel, not even a record of TLS.
        if not (isinstance(connection, ssl.SSLSocket) and connection.pending()):
            select.select([connection], [], [])
        if number == 0:
            self._hears.wait()
        header = _receive(connection, 28)
        _, _, kind, cookie, offset, length = struct.unpack(">IHHQQI", header)
        if kind == _GOODBYE:
            return False
        if kind == _WRITE:
            data = _receive(connection, length)
            self.image[offset : offset + length] = data
        if number == 0 and self._was_deaf:
            return True  # an answer to who is not there any more would reset the connection by itself
        answer = bytes(self.image[offset : offset + length]) if kind == _READ else b""
        connection.sendall(struct.pack(">IIQ", _REPLY, 0, cookie) + answer)
        return True


@contextlib.contextmanager
def deaf_server(size_bytes: int, keys: Path | None) -> Iterator[DeafServer]:
    """Serve on the port of nbd_servers.

    keys: where make_keys put a server's certificate; None: without TLS.
    """
    server = DeafServer(size_bytes, keys)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _RECEIVE_BYTES)
        listener.bind(("127.0.0.1", PORT))
        listener.listen()
        threading.Thread(target=server.accept, args=(listener,), daemon=True).start()
        try:
            yield server
        finally:
            server.hear_again()
            listener.shutdown(socket.SHUT_RDWR)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = b""
    while len(data) < length:
        piece = connection.recv(length - len(data))
        if not piece:
            raise EOFError
        data += piece
    return data
