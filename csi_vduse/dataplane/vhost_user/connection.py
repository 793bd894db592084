"""The socket to a front-end: whole messages with their descriptors in, answers out.

Kept true:
- Nothing here waits: what has come in of a message is kept until the rest is there, and an answer that the
  front-end's socket has no room for ends the connection (it stopped reading what it asks for).
- A read never crosses the end of a message, so that descriptors belong to the message they came with.
- Every descriptor that arrives is closed here unless a handler took it out of the message.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.dataplane.vhost_user.protocol import HEADER_BYTES, MAX_FDS, Header
from csi_vduse.errors import ProtocolError, Unavailable

_FD: Final = array.array("i").itemsize


@dataclass
class Message:
    """A message that is complete, not yet decoded; owns its descriptors."""

    header: Header
    payload: bytes
    fds: list[int] = field(default_factory=list)

    def decode(self) -> protocol.Payload:
        """Return the payload's value.

        Raises:
            ProtocolError: the message breaks the protocol.
        """
        return protocol.decode(self.header, self.payload, len(self.fds))

    def take_fd(self) -> int:
        """Hand over the first descriptor that is left; it is the caller's from then on."""
        return self.fds.pop(0)

    def close(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())


class Connection:
    """One front-end; owns the socket."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(0)
        self.sock = sock
        self._data = bytearray()
        self._header: Header | None = None
        self._fds: list[int] = []

    def close(self) -> None:
        """Close the socket and what came in of an unfinished message."""
        close_all(self._fds)
        self.sock.close()

    def receive(self) -> Message | None:
        """Take in what is there, at most one message; None if it is not complete yet.

        Raises:
            Unavailable: the front-end is gone.
            ProtocolError: the bytes are no message; the stream cannot be read any further.
        """
        while True:
            wanted = HEADER_BYTES if self._header is None else self._header.payload_bytes
            if len(self._data) < wanted and not self._read(wanted - len(self._data)):
                return None
            if len(self._data) < wanted:
                continue
            data = bytes(self._data)
            self._data.clear()
            if self._header is None:
                self._header = protocol.decode_header(data)
                continue
            message, self._header = Message(self._header, data, self._fds), None
            self._fds = []
            return message

    def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Send an answer.

        Raises:
            Unavailable: the front-end is gone, or does not read.
        """
        send(self.sock, data, fds)

    def _read(self, count: int) -> bool:
        try:
            data, ancillary, flags, _ = self.sock.recvmsg(
                count, socket.CMSG_LEN(MAX_FDS * _FD), socket.MSG_CMSG_CLOEXEC
            )
        except (BlockingIOError, InterruptedError):
            return False
        except OSError as error:
            raise Unavailable(f"the front-end is gone: {error.strerror}") from error
        for level, kind, content in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(content[: len(content) - len(content) % _FD])
                self._fds += fds
        if flags & socket.MSG_CTRUNC or len(self._fds) > MAX_FDS:
            raise ProtocolError(
                "a message's descriptors could not all be received",
                hint=f"it has more than {MAX_FDS}, or this process has too many open files",
            )
        if not data:
            raise Unavailable("the front-end closed the connection")
        self._data += data
        return True


def send(sock: socket.socket, data: bytes, fds: Sequence[int] = ()) -> None:
    """Send without waiting and without SIGPIPE.

    Raises:
        Unavailable: the other end is gone, or does not read.
    """
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    try:
        sent = sock.sendmsg([data], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
    except OSError as error:
        raise Unavailable(f"the front-end does not read: {error.strerror}") from error
    if sent != len(data):
        raise Unavailable("the front-end does not read its answers")


def close_all(fds: list[int]) -> None:
    """Close descriptors and forget them."""
    while fds:
        with contextlib.suppress(OSError):
            os.close(fds.pop())
