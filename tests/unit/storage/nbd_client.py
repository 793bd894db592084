"""A small NBD client (fixed newstyle, simple replies) that shows what a node sees: sizes, refusals, cut-offs.

After https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md. Synchronous; with TLS if given a context.
"""

from __future__ import annotations

import socket
import ssl
import struct
from pathlib import Path
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

_OPTION = 0x49484156454F5054
_REPLY = 0x3E889045565A9
_REQUEST = 0x25609513
_STARTTLS, _GO, _LIST = 5, 7, 3
_ACK, _SERVER, _INFO = 1, 2, 3
_READ_ONLY = 1 << 1
READ, WRITE, FLUSH = 0, 1, 3


class Refused(Exception):
    """The server has no such export, or does not let us in."""


class CutOff(Exception):
    """The server closed the connection."""


class NbdClient:
    """A connection to one export; `uri` as the storage server gives it."""

    def __init__(self, uri: str, tls: ssl.SSLContext | None = None, timeout_s: float = 60.0) -> None:
        parts = urlsplit(uri)
        if parts.scheme.endswith("+unix"):
            self._sock = socket.socket(socket.AF_UNIX)
            self._sock.settimeout(timeout_s)
            self._sock.connect(parse_qs(parts.query)["socket"][0])
        else:
            self._sock = socket.create_connection((parts.hostname, parts.port), timeout_s)
        self.size_bytes = self.flags = 0
        self._cookie = 0
        try:
            self._negotiate(parts, tls)
        except BaseException:
            self._sock.close()
            raise

    def _negotiate(self, parts: SplitResult, tls: ssl.SSLContext | None) -> None:
        magic, _option, _flags = struct.unpack(">8sQH", self._take(18))
        assert magic == b"NBDMAGIC"
        self._sock.sendall(struct.pack(">I", 3))  # fixed newstyle, no zeroes
        if parts.scheme.startswith("nbds"):
            assert tls is not None
            if self._ask(_STARTTLS, b"") != [(_ACK, b"")]:
                raise Refused("STARTTLS")
            try:
                self._sock = tls.wrap_socket(self._sock, server_hostname=parts.hostname or "localhost")
            except (ssl.SSLError, OSError) as error:
                raise Refused(str(error)) from error
        self._go(unquote(parts.path.removeprefix("/")))

    def read(self, offset: int, length: int) -> bytes:
        self.submit(READ, offset, length)
        self._reply()
        return self._take(length)

    def write(self, offset: int, data: bytes) -> None:
        self.submit(WRITE, offset, len(data), data)
        self._reply()

    def flush(self) -> None:
        self.submit(FLUSH, 0, 0)
        self._reply()

    def submit(self, command: int, offset: int, length: int, data: bytes = b"") -> None:
        """Send a request and do not wait for its reply."""
        self._cookie += 1
        header = struct.pack(">IHHQQI", _REQUEST, 0, command, self._cookie, offset, length)
        try:
            self._sock.sendall(header + data)
        except OSError as error:
            raise CutOff(str(error)) from error

    @property
    def read_only(self) -> bool:
        return bool(self.flags & _READ_ONLY)

    def close(self) -> None:
        self._sock.close()

    def _go(self, name: str) -> None:
        encoded = name.encode()
        answers = self._ask(_GO, struct.pack(">I", len(encoded)) + encoded + struct.pack(">H", 0))
        for kind, data in answers:
            if kind & 1 << 31:
                raise Refused(data.decode(errors="replace"))
            if kind == _INFO and struct.unpack(">H", data[:2])[0] == 0:
                self.size_bytes, self.flags = struct.unpack(">QH", data[2:12])

    def _ask(self, option: int, data: bytes) -> list[tuple[int, bytes]]:
        try:
            self._sock.sendall(struct.pack(">QII", _OPTION, option, len(data)) + data)
            answers = []
            while not answers or not (answers[-1][0] == _ACK or answers[-1][0] & 1 << 31):
                magic, _echo, kind, length = struct.unpack(">QIII", self._take(20))
                assert magic == _REPLY
                answers.append((kind, self._take(length)))
        except (CutOff, OSError) as error:
            raise Refused(f"the server closed the connection: {error}") from error
        return answers

    def _reply(self) -> None:
        _magic, error, _cookie = struct.unpack(">IIQ", self._take(16))
        if error:
            raise OSError(error, "the server answered with an error")

    def _take(self, length: int) -> bytes:
        data = b""
        while len(data) < length:
            try:
                part = self._sock.recv(length - len(data))
            except ConnectionError as error:
                raise CutOff(str(error)) from error
            if not part:
                raise CutOff("end of file")
            data += part
        return data


def tls_context(directory: Path) -> ssl.SSLContext:
    """A client's context with the certificate in a directory as QEMU names the files."""
    context = ssl.create_default_context(cafile=directory / "ca-cert.pem")
    context.load_cert_chain(directory / "client-cert.pem", directory / "client-key.pem")
    return context
