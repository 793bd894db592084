"""A vhost-user front-end of the tests' own, for what well-behaved ones never do: one message at a time, any bytes.

It has a small guest: 4 MiB of memory with one ring, and a driver that can ask for one sector at a time.
"""

from __future__ import annotations

import array
import mmap
import os
import select
import socket
import struct

from csi_vduse.dataplane.vhost_user.protocol import Request

MEMORY_BYTES = 4 << 20
GUEST = 0x10_0000  # where the guest sees its memory, and where the front-end claims to have it mapped
USER = 0x7F00_0000_0000
SIZE = 16
DESC, AVAIL, USED, DATA = 0, 0x1000, 0x2000, 0x10000
REPLY_TIMEOUT_S = 10

FEATURES = 1 << 32 | 1 << 30
PROTOCOL_FEATURES = 1 << 0 | 1 << 3 | 1 << 9 | 1 << 12 | 1 << 15


def number(value: int) -> bytes:
    return struct.pack("=Q", value)


def state(index: int, value: int) -> bytes:
    return struct.pack("=II", index, value)


def region(guest: int, size: int, user: int, offset: int = 0) -> bytes:
    return struct.pack("=QQQQ", guest, size, user, offset)


class Frontend:
    """The front-end's end of a connection, and its guest."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        sock.settimeout(REPLY_TIMEOUT_S)
        self.memory_fd = os.memfd_create("guest")
        os.ftruncate(self.memory_fd, MEMORY_BYTES)
        self.memory = mmap.mmap(self.memory_fd, MEMORY_BYTES)
        self.kick = os.eventfd(0, os.EFD_NONBLOCK)
        self.call = os.eventfd(0, os.EFD_NONBLOCK)
        self.error = os.eventfd(0, os.EFD_NONBLOCK)
        self.submitted = 0

    def reconnect(self, sock: socket.socket) -> None:
        """Go on with another server; the guest's memory stays as it is."""
        self.sock.close()
        self.sock = sock
        sock.settimeout(REPLY_TIMEOUT_S)

    def close(self) -> None:
        self.sock.close()
        self.memory.close()
        for fd in (self.memory_fd, self.kick, self.call, self.error):
            os.close(fd)

    # Messages

    def send(self, request: int, payload: bytes = b"", fds: tuple[int, ...] = (), *, flags: int = 1) -> None:
        self.send_raw(struct.pack("=III", request, flags, len(payload)) + payload, fds)

    def send_raw(self, data: bytes, fds: tuple[int, ...] = ()) -> None:
        rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        self.sock.sendmsg([data], rights)

    def receive(self) -> tuple[int, bytes]:
        header = self._exactly(12)
        return self._rest(header)

    def receive_fd(self) -> tuple[bytes, int]:
        """The payload of an answer, and the descriptor that came with it."""
        header, fds, _, _ = socket.recv_fds(self.sock, 12, 1)
        return self._rest(header)[1], fds[0]

    def _rest(self, header: bytes) -> tuple[int, bytes]:
        request, flags, size = struct.unpack("=III", header)
        assert flags == 5
        return request, self._exactly(size)

    def ask(self, request: Request, payload: bytes = b"") -> bytes:
        self.send(request, payload)
        answered, reply = self.receive()
        assert answered == request
        return reply

    def acked(self, request: Request, payload: bytes = b"", fds: tuple[int, ...] = ()) -> bool:
        """Send a message that wants to be acknowledged; whether it was done."""
        self.send(request, payload, fds, flags=1 | 8)
        answered, reply = self.receive()
        assert answered == request
        (status,) = struct.unpack("=Q", reply)
        return bool(status == 0)

    def _exactly(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            piece = self.sock.recv(count - len(data))
            if not piece:
                raise EOFError
            data += piece
        return data

    # A whole disk

    def negotiate(self, features: int = FEATURES, protocol_features: int = PROTOCOL_FEATURES) -> None:
        self.ask(Request.GET_FEATURES)
        self.send(Request.SET_FEATURES, number(features))
        self.ask(Request.GET_PROTOCOL_FEATURES)
        self.send(Request.SET_PROTOCOL_FEATURES, number(protocol_features))
        self.send(Request.SET_OWNER)

    def give_memory(self) -> None:
        table = struct.pack("=II", 1, 0) + region(GUEST, MEMORY_BYTES, USER)
        assert self.acked(Request.SET_MEM_TABLE, table, (self.memory_fd,))

    def give_ring(self, index: int = 0, base: int = 0) -> None:
        assert self.acked(Request.SET_VRING_NUM, state(index, SIZE))
        assert self.acked(Request.SET_VRING_BASE, state(index, base))
        assert self.acked(Request.SET_VRING_ADDR, self.addresses(index))
        assert self.acked(Request.SET_VRING_CALL, number(index), (self.call,))
        assert self.acked(Request.SET_VRING_ERR, number(index), (self.error,))
        assert self.acked(Request.SET_VRING_KICK, number(index), (self.kick,))

    def enable(self, value: int = 1, index: int = 0) -> None:
        assert self.acked(Request.SET_VRING_ENABLE, state(index, value))

    def start(self) -> None:
        self.negotiate()
        self.give_memory()
        self.give_ring()
        self.enable()

    @staticmethod
    def addresses(index: int = 0, flags: int = 0) -> bytes:
        return struct.pack("=IIQQQQ", index, flags, USER + DESC, USER + USED, USER + AVAIL, 0)

    # Its guest

    def describe(self, head: int) -> None:
        """Write the request for sector 0 into three descriptors, from head on."""
        header = GUEST + DATA
        self.memory[DATA : DATA + 16] = struct.pack("<IIQ", 0, 0, 0)
        chain = struct.pack("<QIHH", header, 16, 1, head + 1)
        chain += struct.pack("<QIHH", header + 0x1000, 512, 1 | 2, head + 2)
        chain += struct.pack("<QIHH", header + 0x2000, 1, 2, 0)
        self.memory[DESC + 16 * head : DESC + 16 * head + len(chain)] = chain

    def submit(self) -> None:
        """Ask for sector 0, and kick."""
        self.memory[DATA + 0x1000 : DATA + 0x1200] = b"\xff" * 512
        self.memory[DATA + 0x2000] = 0xFF
        self.describe(0)
        self.make_available(0)

    def make_available(self, head: int) -> None:
        slot = AVAIL + 4 + 2 * (self.submitted % SIZE)
        self.memory[slot : slot + 2] = struct.pack("<H", head)
        self.submitted += 1
        self.memory[AVAIL + 2 : AVAIL + 4] = struct.pack("<H", self.submitted)
        os.eventfd_write(self.kick, 1)

    def take_back(self, count: int) -> None:
        """Forget the last requests, as a driver does that sets a stopped ring up again."""
        self.submitted -= count
        self.memory[AVAIL + 2 : AVAIL + 4] = struct.pack("<H", self.submitted)

    def used_ids(self) -> list[int]:
        """The heads that have come back, oldest first."""
        entries = struct.unpack(f"<{2 * SIZE}I", self.memory[USED + 4 : USED + 4 + 8 * SIZE])
        return list(entries[::2])[: self.used()]

    def used(self) -> int:
        return int(struct.unpack("<H", self.memory[USED + 2 : USED + 4])[0])

    def sector(self) -> tuple[int, bytes]:
        """The status and the data of the last request."""
        return self.memory[DATA + 0x2000], self.memory[DATA + 0x1000 : DATA + 0x1200]

    def answered(self, timeout_s: float) -> bool:
        """Whether something has come back that nobody has received."""
        return bool(select.select([self.sock], [], [], timeout_s)[0])

    @staticmethod
    def signalled(fd: int, timeout_s: float = REPLY_TIMEOUT_S) -> bool:
        """Whether an eventfd was written to; it is read."""
        if not select.select([fd], [], [], timeout_s)[0]:
            return False
        os.eventfd_read(fd)
        return True
