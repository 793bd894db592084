"""A front-end that sends whatever the input says: atheris against the vhost-user session, over the real engine.

Messages have good headers, or any; payloads made of numbers that make sense to a session, or any bytes; and
descriptors of every kind that may be confused. What may come of it: answers, or ProtocolError or Unavailable, which
end the connection. What may not: another exception, a descriptor left open, a queue that does not stop.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import atheris

with atheris.instrument_imports(include=["csi_vduse.dataplane"]):
    from csi_vduse.dataplane.backend_spec import NullBackend
    from csi_vduse.dataplane.device import DeviceSpec
    from csi_vduse.dataplane.engine import Engine
    from csi_vduse.dataplane.vhost_user.connection import Connection
    from csi_vduse.dataplane.vhost_user.inflight import create
    from csi_vduse.dataplane.vhost_user.protocol import Inflight, Request
    from csi_vduse.dataplane.vhost_user.session import Session
from csi_vduse import log
from csi_vduse.errors import ProtocolError, Unavailable

GUEST: Final = 0x1000_0000
USER: Final = 0x7F00_0000_0000
MEMORY_BYTES: Final = 1 << 20
SPEC: Final = DeviceSpec("disk", 1 << 20, queues=2, queue_size=128)
REQUESTS: Final = [int(request) for request in Request]
NUMBERS: Final = [
    0,
    1,
    2,
    4,
    16,
    128,
    256,
    0xFFFF,
    0x8000_8000,
    GUEST,
    USER,
    USER + 0x4000,
    USER + 0x8000,
    MEMORY_BYTES,
    4096,
    1 << 30,
    1 << 34 | 1 << 32 | 1 << 30,
    (1 << 64) - 1,
    0x9029,
    1 << 12 | 1 << 3,
]


def _files() -> list[int]:
    """One of each kind; the same ones for all inputs."""
    memory = os.memfd_create("memory", os.MFD_CLOEXEC)
    os.ftruncate(memory, MEMORY_BYTES)
    log_fd, _ = create(Inflight(0, 0, 2, 16, 20), packed=False, max_queues=2)
    kick = os.eventfd(0, os.EFD_NONBLOCK)
    call = os.eventfd(0, os.EFD_NONBLOCK)
    ours, theirs = socket.socketpair()
    empty = os.memfd_create("empty", os.MFD_CLOEXEC)
    return [
        memory,
        kick,
        call,
        log_fd,
        ours.detach(),
        theirs.detach(),
        empty,
        os.open("/dev/null", os.O_RDWR),
    ]


FILES: Final = _files()


def _number(data: Any) -> int:
    at = data.ConsumeIntInRange(0, len(NUMBERS))
    return NUMBERS[at] if at < len(NUMBERS) else data.ConsumeUInt(8)


def _queue(data: Any) -> int:
    return data.ConsumeIntInRange(0, SPEC.queues)


def _table(data: Any) -> bytes:
    count = data.ConsumeIntInRange(0, 3)
    starts = [i * MEMORY_BYTES for i in range(count)]
    regions = [struct.pack("=QQQQ", GUEST + at, _number(data), USER + at, 0) for at in starts]
    return struct.pack("=II", count, 0) + b"".join(regions)


def _addresses(data: Any) -> bytes:
    ring = USER + data.ConsumeIntInRange(0, 3) * 0x8000
    return struct.pack("=IIQQQQ", _queue(data), 0, ring, ring + 0x4000, ring + 0x2000, 0)


def _config(data: Any) -> bytes:
    size = data.ConsumeIntInRange(0, 64)
    return struct.pack("=III", _number(data) & 0xFFFF_FFFF, size, 0) + bytes(size)


# What messages have; which of them it is does not depend on the request.
PAYLOADS: Final[list[Callable[[Any], bytes]]] = [
    lambda _: b"",
    lambda data: struct.pack("=Q", _number(data)),
    lambda data: struct.pack("=II", _queue(data), _number(data) & 0xFFFF_FFFF),
    _addresses,
    _table,
    lambda data: struct.pack("=QQQQQ", 0, GUEST, MEMORY_BYTES, USER, _number(data)),
    lambda data: struct.pack("=QQHH", _number(data), _number(data), _queue(data), _number(data) & 0xFFFF),
    _config,
    lambda data: bytes(data.ConsumeBytes(data.ConsumeIntInRange(0, 80))),
]


def _send(sock: socket.socket, data: Any) -> None:
    request = data.PickValueInList(REQUESTS) if data.ConsumeIntInRange(0, 15) else data.ConsumeUInt(4)
    flags = 1 | 8 if data.ConsumeIntInRange(0, 7) else data.ConsumeUInt(1)
    payload = data.PickValueInList(PAYLOADS)(data)
    size = len(payload) if data.ConsumeIntInRange(0, 15) else data.ConsumeUInt(2)
    fds = [data.PickValueInList(FILES) for _ in range(data.ConsumeIntInRange(0, 3))]
    packet = struct.pack("=III", request, flags, size) + payload
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    sock.sendmsg([packet], ancillary, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)


def _scribble(data: Any) -> None:
    """Write into the guest's memory, where the rings are, or make it shorter."""
    if data.ConsumeIntInRange(0, 15):
        os.pwrite(FILES[0], data.ConsumeBytes(16), data.ConsumeIntInRange(0, 0x1FFFF))
    else:
        os.ftruncate(FILES[0], data.ConsumeIntInRange(0, 256) * 4096)


def one_input(raw: bytes) -> None:
    """Run one session."""
    data = atheris.FuzzedDataProvider(raw)
    before = len(list(Path("/proc/self/fd").iterdir()))
    os.ftruncate(FILES[0], MEMORY_BYTES)
    ours, theirs = socket.socketpair()
    engine = _engine()
    session = Session(Connection(ours), engine, SPEC, memory_slots=4)
    with contextlib.suppress(ProtocolError, Unavailable, BlockingIOError):
        for _ in range(_start(theirs, data)):
            session.handle_input()
        while data.remaining_bytes():
            if data.ConsumeIntInRange(0, 5):
                _send(theirs, data)
            else:
                _scribble(data)
                continue
            session.handle_input()  # header and payload, or what there is of them
            with contextlib.suppress(BlockingIOError):
                theirs.recv(1 << 16, socket.MSG_DONTWAIT)
    session.close()
    theirs.close()
    engine.close()
    after = len(list(Path("/proc/self/fd").iterdir()))
    if after != before:
        raise RuntimeError(f"{after - before} descriptors left open")


def _engine() -> Engine:
    return Engine(
        backend=NullBackend(),
        capacity_bytes=SPEC.capacity_bytes,
        block_size_bytes=512,
        max_queues=SPEC.queues,
        read_only=False,
        serial="disk",
        event_fd=-1,
    )


def _start(sock: socket.socket, data: Any) -> int:
    """Begin as a good front-end does, so that inputs get to rings that run; return how many messages that took."""
    if not data.ConsumeBool():
        return 0
    raw = struct.Struct("=III")
    messages = (
        (Request.SET_PROTOCOL_FEATURES, struct.pack("=Q", 1 << 3 | 1 << 12 | 1 << 15), []),
        (Request.SET_FEATURES, struct.pack("=Q", 1 << 30 | 1 << 32 | data.ConsumeIntInRange(0, 1) << 34), []),
        (Request.SET_MEM_TABLE, struct.pack("=IIQQQQ", 1, 0, GUEST, MEMORY_BYTES, USER, 0), FILES[:1]),
        (Request.SET_VRING_NUM, struct.pack("=II", 0, 16), []),
        (Request.SET_VRING_ADDR, struct.pack("=IIQQQQ", 0, 0, USER, USER + 0x4000, USER + 0x2000, 0), []),
        (Request.SET_VRING_KICK, struct.pack("=Q", 0), FILES[1:2]),
    )
    for request, payload, fds in messages:
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
        sock.sendmsg([raw.pack(request, 1, len(payload)) + payload], ancillary)
    return len(messages)


def main() -> None:
    """Fuzz until the options of libFuzzer say that it is enough."""
    log.configure(level="CRITICAL", component="fuzz")
    _engine().close()  # the first of a process opens what all of them share
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
