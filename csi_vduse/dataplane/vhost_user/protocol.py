"""vhost-user messages: bytes to values and back (QEMU, docs/interop/vhost-user.rst). Pure functions.

Whoever connects chooses every byte, so nothing is assumed: a message is decoded by the one table `_SPECS`, which
says for each request how long its payload is, how it is read and how many descriptors come along. What does not
fit raises ProtocolError and nothing else. Numbers are in the machine's byte order, as the protocol wants it.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Final

from csi_vduse.errors import ProtocolError

HEADER_BYTES: Final = 12
MAX_PAYLOAD_BYTES: Final = 512  # the longest that we know has 268
MAX_FDS: Final = 8
MAX_TABLE_REGIONS: Final = 8
MAX_CONFIG_BYTES: Final = 256
MAX_QUEUE_SIZE: Final = 1024  # VD_QUEUE_SIZE_MAX
NO_FD: Final = 1 << 8  # in the number of SET_VRING_KICK, _CALL and _ERR, beside the index

F_PROTOCOL_FEATURES: Final = 1 << 30  # of the virtio features; no driver ever sees it

VERSION: Final = 1
_VERSION_MASK: Final = 3
REPLY: Final = 1 << 2
NEED_REPLY: Final = 1 << 3


class Request(IntEnum):
    """What a front-end may ask; those that are missing belong to devices or features that we do not offer."""

    GET_FEATURES = 1
    SET_FEATURES = 2
    SET_OWNER = 3
    RESET_OWNER = 4
    SET_MEM_TABLE = 5
    SET_VRING_NUM = 8
    SET_VRING_ADDR = 9
    SET_VRING_BASE = 10
    GET_VRING_BASE = 11
    SET_VRING_KICK = 12
    SET_VRING_CALL = 13
    SET_VRING_ERR = 14
    GET_PROTOCOL_FEATURES = 15
    SET_PROTOCOL_FEATURES = 16
    GET_QUEUE_NUM = 17
    SET_VRING_ENABLE = 18
    SET_BACKEND_REQ_FD = 21
    GET_CONFIG = 24
    SET_CONFIG = 25
    GET_INFLIGHT_FD = 31
    SET_INFLIGHT_FD = 32
    RESET_DEVICE = 34
    GET_MAX_MEM_SLOTS = 36
    ADD_MEM_REG = 37
    REM_MEM_REG = 38


class BackendRequest(IntEnum):
    """What we may ask on the socket that SET_BACKEND_REQ_FD brings."""

    CONFIG_CHANGE = 2


class ProtocolFeature(IntFlag):
    """Extensions of the protocol, negotiated apart from the virtio features."""

    MQ = 1 << 0
    REPLY_ACK = 1 << 3
    BACKEND_REQ = 1 << 5
    CONFIG = 1 << 9
    INFLIGHT_SHMFD = 1 << 12
    RESET_DEVICE = 1 << 13
    CONFIGURE_MEM_SLOTS = 1 << 15


@dataclass(frozen=True)
class Header:
    """The first twelve bytes of a message."""

    request: int
    needs_reply: bool
    payload_bytes: int

    @property
    def name(self) -> str:
        """For the log."""
        try:
            return Request(self.request).name
        except ValueError:
            return f"request {self.request}"


@dataclass(frozen=True)
class Empty:
    """No payload."""


@dataclass(frozen=True)
class Number:
    """A 64-bit number."""

    value: int


@dataclass(frozen=True)
class VringState:
    """A number that belongs to a queue."""

    index: int
    number: int


@dataclass(frozen=True)
class VringAddress:
    """Where the parts of a ring are, as addresses of the front-end's own memory."""

    index: int
    flags: int
    descriptor: int
    used: int
    available: int


@dataclass(frozen=True)
class VringFd:
    """An eventfd for a queue comes along, or none."""

    index: int
    has_fd: bool


@dataclass(frozen=True)
class MemoryRegion:
    """Guest memory and where it is in the file that comes along."""

    guest_address: int
    size_bytes: int
    user_address: int
    mmap_offset: int


@dataclass(frozen=True)
class MemoryTable:
    """All of the guest's memory, a descriptor for each region."""

    regions: tuple[MemoryRegion, ...]


@dataclass(frozen=True)
class ConfigAccess:
    """A piece of the configuration space; data is what a write would put there."""

    offset: int
    size_bytes: int
    flags: int
    data: bytes


@dataclass(frozen=True)
class Inflight:
    """A shared file in which the back-end notes what is in flight.

    payload_bytes: QEMU sends the structure with its padding, others without; the answer must be like the question.
    """

    mmap_size: int
    mmap_offset: int
    queues: int
    queue_size: int
    payload_bytes: int


Payload = (
    Empty
    | Number
    | VringState
    | VringAddress
    | VringFd
    | MemoryRegion
    | MemoryTable
    | ConfigAccess
    | Inflight
)

HEADER = struct.Struct("=III")
NUMBER = struct.Struct("=Q")
VRING_STATE = struct.Struct("=II")
VRING_ADDRESS = struct.Struct("=IIQQQQ")
REGION = struct.Struct("=QQQQ")
CONFIG = struct.Struct("=III")
_INFLIGHT = struct.Struct("=QQHH")
_INFLIGHT_PADDED: Final = 24


def decode_header(data: bytes) -> Header:
    """Decode a header.

    Raises:
        ProtocolError: it cannot be one; where the next message would start is not known either.
    """
    if len(data) != HEADER_BYTES:
        raise ProtocolError(f"a header of {len(data)} bytes")
    request, flags, size = HEADER.unpack(data)
    if flags & _VERSION_MASK != VERSION or flags & ~(_VERSION_MASK | NEED_REPLY):
        raise ProtocolError(f"flags {flags:#x} in a header of request {request}")
    if size > MAX_PAYLOAD_BYTES:
        raise ProtocolError(f"request {request} with {size} bytes of payload")
    return Header(request, bool(flags & NEED_REPLY), size)


def decode(header: Header, payload: bytes, fd_count: int) -> Payload:
    """Decode the payload of a message that has come in whole.

    Raises:
        ProtocolError: unknown request, or one whose payload or descriptors are not what it has.
    """
    try:
        spec = _SPECS[Request(header.request)]
    except ValueError:
        raise ProtocolError(f"{header.name} belongs to nothing that was offered") from None
    if len(payload) != header.payload_bytes:
        raise ProtocolError(f"{header.name}: {len(payload)} bytes instead of {header.payload_bytes}")
    value = spec.decode(payload)
    wanted = spec.fds(value)
    if fd_count not in wanted:
        raise ProtocolError(f"{header.name} came with {fd_count} descriptors")
    return value


def encode_reply(request: int, payload: bytes) -> bytes:
    """Encode the answer to a request."""
    return HEADER.pack(request, VERSION | REPLY, len(payload)) + payload


def encode_request(request: BackendRequest) -> bytes:
    """Encode a request of ours that has no payload and wants no answer."""
    return HEADER.pack(request, VERSION, 0)


def encode_number(value: int) -> bytes:
    """Encode the payload of an answer that is one number."""
    return NUMBER.pack(value)


def encode_vring_state(index: int, number: int) -> bytes:
    """Encode the payload of the answer to GET_VRING_BASE."""
    return VRING_STATE.pack(index, number)


def encode_config(access: ConfigAccess, data: bytes) -> bytes:
    """Encode the payload of the answer to GET_CONFIG."""
    return CONFIG.pack(access.offset, len(data), access.flags) + data


def encode_inflight(inflight: Inflight) -> bytes:
    """Encode the payload of the answer to GET_INFLIGHT_FD."""
    packed = _INFLIGHT.pack(inflight.mmap_size, inflight.mmap_offset, inflight.queues, inflight.queue_size)
    return packed.ljust(inflight.payload_bytes, b"\0")


def _sized(payload: bytes, *sizes: int) -> bytes:
    if len(payload) not in sizes:
        raise ProtocolError(f"a payload of {len(payload)} bytes instead of {' or '.join(map(str, sizes))}")
    return payload


def _decode_empty(payload: bytes) -> Empty:
    _sized(payload, 0)
    return Empty()


def _decode_number(payload: bytes) -> Number:
    return Number(*NUMBER.unpack(_sized(payload, NUMBER.size)))


def _decode_vring_state(payload: bytes) -> VringState:
    return VringState(*VRING_STATE.unpack(_sized(payload, VRING_STATE.size)))


def _decode_vring_address(payload: bytes) -> VringAddress:
    index, flags, descriptor, used, available, _ = VRING_ADDRESS.unpack(_sized(payload, VRING_ADDRESS.size))
    return VringAddress(index, flags, descriptor, used, available)


def _decode_vring_fd(payload: bytes) -> VringFd:
    (value,) = NUMBER.unpack(_sized(payload, NUMBER.size))
    if value & ~(NO_FD | 0xFF):
        raise ProtocolError(f"{value:#x} is not the number of a queue")
    return VringFd(value & 0xFF, not value & NO_FD)


def _decode_region(payload: bytes) -> MemoryRegion:
    _sized(payload, 8 + REGION.size)
    return _region(payload, 8)


def _decode_table(payload: bytes) -> MemoryTable:
    if len(payload) < VRING_STATE.size:
        raise ProtocolError(f"a memory table of {len(payload)} bytes")
    count, _ = VRING_STATE.unpack_from(payload)
    if count > MAX_TABLE_REGIONS:
        raise ProtocolError(f"a memory table of {count} regions")
    _sized(payload, 8 + count * REGION.size)
    return MemoryTable(tuple(_region(payload, 8 + number * REGION.size) for number in range(count)))


def _region(payload: bytes, offset: int) -> MemoryRegion:
    region = MemoryRegion(*REGION.unpack_from(payload, offset))
    for start in (region.guest_address, region.user_address, region.mmap_offset):
        if not region.size_bytes or start + region.size_bytes > 1 << 64:
            raise ProtocolError(f"a memory region of {region.size_bytes:#x} bytes at {start:#x}")
    if region.mmap_offset + region.size_bytes >= 1 << 63:
        raise ProtocolError(f"a memory region at offset {region.mmap_offset:#x} of its file")
    return region


def _decode_config(payload: bytes) -> ConfigAccess:
    if len(payload) < CONFIG.size:
        raise ProtocolError(f"an access to the configuration space of {len(payload)} bytes")
    offset, size, flags = CONFIG.unpack_from(payload)
    _sized(payload, CONFIG.size + size)
    if offset + size > MAX_CONFIG_BYTES:
        raise ProtocolError(f"an access to byte {offset + size} of the configuration space")
    return ConfigAccess(offset, size, flags, payload[CONFIG.size :])


def _decode_inflight(payload: bytes) -> Inflight:
    _sized(payload, _INFLIGHT.size, _INFLIGHT_PADDED)
    size, offset, queues, queue_size = _INFLIGHT.unpack_from(payload)
    return Inflight(size, offset, queues, queue_size, len(payload))


@dataclass(frozen=True)
class _Spec:
    decode: Callable[[bytes], Payload]
    fds: Callable[[Payload], tuple[int, ...]]  # how many may come along


def _none(_: Payload) -> tuple[int, ...]:
    return (0,)


def _one(_: Payload) -> tuple[int, ...]:
    return (1,)


def _none_or_one(_: Payload) -> tuple[int, ...]:
    return (0, 1)  # REM_MEM_REG: some front-ends send one, to be closed unused


def _if_said(payload: Payload) -> tuple[int, ...]:
    return (int(isinstance(payload, VringFd) and payload.has_fd),)


def _per_region(payload: Payload) -> tuple[int, ...]:
    return (len(payload.regions) if isinstance(payload, MemoryTable) else 0,)


_SPECS: Final = {
    Request.GET_FEATURES: _Spec(_decode_empty, _none),
    Request.SET_FEATURES: _Spec(_decode_number, _none),
    Request.SET_OWNER: _Spec(_decode_empty, _none),
    Request.RESET_OWNER: _Spec(_decode_empty, _none),
    Request.SET_MEM_TABLE: _Spec(_decode_table, _per_region),
    Request.SET_VRING_NUM: _Spec(_decode_vring_state, _none),
    Request.SET_VRING_ADDR: _Spec(_decode_vring_address, _none),
    Request.SET_VRING_BASE: _Spec(_decode_vring_state, _none),
    Request.GET_VRING_BASE: _Spec(_decode_vring_state, _none),
    Request.SET_VRING_KICK: _Spec(_decode_vring_fd, _if_said),
    Request.SET_VRING_CALL: _Spec(_decode_vring_fd, _if_said),
    Request.SET_VRING_ERR: _Spec(_decode_vring_fd, _if_said),
    Request.GET_PROTOCOL_FEATURES: _Spec(_decode_empty, _none),
    Request.SET_PROTOCOL_FEATURES: _Spec(_decode_number, _none),
    Request.GET_QUEUE_NUM: _Spec(_decode_empty, _none),
    Request.SET_VRING_ENABLE: _Spec(_decode_vring_state, _none),
    Request.SET_BACKEND_REQ_FD: _Spec(_decode_empty, _one),
    Request.GET_CONFIG: _Spec(_decode_config, _none),
    Request.SET_CONFIG: _Spec(_decode_config, _none),
    Request.GET_INFLIGHT_FD: _Spec(_decode_inflight, _none),
    Request.SET_INFLIGHT_FD: _Spec(_decode_inflight, _one),
    Request.RESET_DEVICE: _Spec(_decode_empty, _none),
    Request.GET_MAX_MEM_SLOTS: _Spec(_decode_empty, _none),
    Request.ADD_MEM_REG: _Spec(_decode_region, _one),
    Request.REM_MEM_REG: _Spec(_decode_region, _none_or_one),
}
