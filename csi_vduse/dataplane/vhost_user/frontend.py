"""A connection to a vhost-user server, on which we ask and it answers (QEMU, docs/interop/vhost-user.rst).

Kept true: every request is answered before the next is sent, or the connection is of no use any more; nothing that a
server sends is believed before it fits what was asked (requests.py), and descriptors that it sends are dropped.
"""

from __future__ import annotations

import array
import contextlib
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from csi_vduse.dataplane.vhost_user import requests
from csi_vduse.dataplane.vhost_user.offer import CONFIG_BYTES, Offer
from csi_vduse.dataplane.vhost_user.protocol import (
    F_PROTOCOL_FEATURES,
    HEADER_BYTES,
    Inflight,
    MemoryRegion,
    ProtocolFeature,
    Request,
    VringAddress,
)
from csi_vduse.dataplane.vhost_user.requests import Question
from csi_vduse.errors import (
    DeadlineExceeded,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Unavailable,
    VduseError,
)

ANSWER_TIMEOUT_S: Final = 10.0


Pair = tuple[socket.socket, socket.socket]
"""The channel on which a server tells of changes: our end, and the server's."""


class FrontEnd:
    """The front-end's end; owns the sockets.

    Every method raises Unavailable if the server is gone, DeadlineExceeded if it does not answer in time, and
    ProtocolError if it answers something else or refuses.
    """

    def __init__(
        self, sock: socket.socket, changes: Pair | None = None, *, timeout_s: float = ANSWER_TIMEOUT_S
    ) -> None:
        self.sock = sock
        self.changes = changes[0] if changes else None
        self._for_server = changes[1] if changes else None
        self._timeout_s = timeout_s

    def shut(self) -> None:
        """End the connection, from any thread: who waits for an answer on it gets Unavailable."""
        with contextlib.suppress(OSError):
            self.sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """End the connection and close the sockets."""
        self.sock.close()
        for end in (self.changes, self._for_server):
            if end is not None:
                end.close()

    def listen(self) -> None:
        """Take in what the server sends without having been asked: nothing but its end may come."""
        self._receive(self.sock, 1, time.monotonic())
        raise ProtocolError("the vhost-user server answered what was not asked")

    def open_changes(self) -> None:
        """Give the server the channel `changes`, to tell on it when its configuration space is another one."""
        if self._for_server is not None:
            with self._for_server as theirs:
                self._tell(requests.changes_channel(), [theirs.fileno()])

    def take_change(self) -> None:
        """Take in that the configuration space is another one."""
        if self.changes is None:
            return
        header = self._receive(self.changes, HEADER_BYTES, time.monotonic() + self._timeout_s)
        if answer := requests.check_change(header):
            self._write(self.changes, answer, [])

    def negotiate(self, kind: type[Offer] = Offer) -> Offer:
        """Begin: agree on the protocol, and hear what the server offers, of that kind of device."""
        features = requests.number_in(self._ask(requests.number(Request.GET_FEATURES)))
        if not features & F_PROTOCOL_FEATURES:
            raise ProtocolError("the vhost-user server knows no protocol features: it is too old")
        offered = requests.number_in(self._ask(requests.number(Request.GET_PROTOCOL_FEATURES)))
        agreed = ProtocolFeature(offered & kind.wanted)
        self._ask(requests.protocol_features(agreed))
        no_config = bytes(CONFIG_BYTES)
        lacks_config = kind.shows_config and not agreed & ProtocolFeature.CONFIG
        if lacks_config or not agreed & ProtocolFeature.REPLY_ACK:
            return kind(features, agreed, 1, no_config)  # which is refused, with the reason
        self._tell(requests.owner())
        queues = 1
        if agreed & ProtocolFeature.MQ:
            queues = requests.number_in(self._ask(requests.number(Request.GET_QUEUE_NUM)))
        return kind(features, agreed, queues, self.config() if kind.shows_config else no_config)

    def config(self) -> bytes:
        """Read the configuration space."""
        return requests.config_in(self._ask(requests.config(CONFIG_BYTES)))

    def set_features(self, bits: int) -> None:
        """Set the virtio features, and that the protocol's are used."""
        self._tell(requests.features(bits))

    def set_inflight(self, log: Inflight, fd: int) -> None:
        """Give the server the log that it, or another before it, keeps."""
        self._tell(requests.inflight(log), [fd])

    def set_memory(self, regions: Sequence[tuple[MemoryRegion, int]]) -> None:
        """Give the server the driver's memory, and no other than that."""
        self._tell(requests.memory_table([region for region, _ in regions]), [fd for _, fd in regions])

    def start_ring(self, size: int, base: int, address: VringAddress, *, call_fd: int, kick_fd: int) -> None:
        """Have the server work on a ring, from this place of its available ring on."""
        index = address.index
        self._tell(requests.of_ring(Request.SET_VRING_NUM, index, size))
        self._tell(requests.of_ring(Request.SET_VRING_BASE, index, base))
        self._tell(requests.ring_address(address))
        self._tell(requests.ring_eventfd(Request.SET_VRING_CALL, index), [call_fd])
        self._tell(requests.ring_eventfd(Request.SET_VRING_KICK, index), [kick_fd])
        self._tell(requests.of_ring(Request.SET_VRING_ENABLE, index, 1))

    def stop_ring(self, index: int) -> int:
        """Stop a ring, which may take as long as what is in flight; returns the place where it stopped."""
        return requests.base_in(self._ask(requests.ring_base(index), bounded=False), index)

    def _ask(self, question: Question, fds: Sequence[int] = (), *, bounded: bool = True) -> bytes:
        deadline = time.monotonic() + self._timeout_s if bounded else None
        self._write(self.sock, requests.encode(question), fds)
        if not question.answer_bytes:
            return b""
        requests.check_answer(self._receive(self.sock, HEADER_BYTES, deadline), question)
        return self._receive(self.sock, question.answer_bytes, deadline)

    def _tell(self, question: Question, fds: Sequence[int] = ()) -> None:
        result = requests.number_in(self._ask(question, fds))
        if result:
            raise ProtocolError(f"the vhost-user server refused {question.request.name} ({result})")

    def _write(self, sock: socket.socket, data: bytes, fds: Sequence[int]) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        try:
            # A message is shorter than any socket's buffer, and nothing else is under way.
            sent = sock.sendmsg([data], rights, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except OSError as error:
            raise Unavailable(f"the vhost-user server is gone: {error.strerror}") from error
        if sent != len(data):
            raise Unavailable("the vhost-user server does not read what it is sent")

    def _receive(self, sock: socket.socket, count: int, deadline: float | None) -> bytes:
        data = b""
        while len(data) < count:
            sock.settimeout(None if deadline is None else max(0.001, deadline - time.monotonic()))
            try:
                piece = sock.recv(count - len(data))
            except TimeoutError:
                raise DeadlineExceeded(
                    f"the vhost-user server has not answered for {self._timeout_s:g} s",
                    hint="SPDK answers nobody while the requests of one disk drain",
                ) from None
            except OSError as error:
                raise Unavailable(f"the vhost-user server is gone: {error.strerror}") from error
            if not piece:
                raise Unavailable("the vhost-user server closed the connection")
            data += piece
        return data


def connect(path: Path) -> socket.socket:
    """Connect to a server, at once or not.

    Raises:
        NotFound: there is no socket.
        PermissionDenied: it is not for us.
        Unavailable: nobody listens, or its queue is full.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        sock.connect(str(path))
    except OSError as error:
        sock.close()
        text = f"vhost-user server at {path}: {error.strerror or error}"
        kinds = {FileNotFoundError: NotFound, PermissionError: PermissionDenied}
        raise kinds.get(type(error), Unavailable)(
            text, hint="see that it runs, and where it listens"
        ) from error
    return sock


def dial(path: Path) -> tuple[socket.socket, Pair]:
    """Connect, with a channel for changes: all that a FrontEnd is made of; raises as connect, and OSError."""
    changes = socket.socketpair()
    try:
        return connect(path), changes
    except VduseError:
        for end in changes:
            end.close()
        raise


def probe(path: Path, kind: type[Offer] = Offer) -> Offer:
    """Ask a server what it offers, and leave.

    Raises:
        NotFound, PermissionDenied, Unavailable, DeadlineExceeded, ProtocolError: as `connect` and `FrontEnd` say.
    """
    front_end = FrontEnd(connect(path))
    try:
        return front_end.negotiate(kind)
    finally:
        front_end.close()
