"""What a front-end says, and how it reads what a server answers: the other side of protocol.py. Pure functions.

A server is trusted with the driver's memory and with nothing else: an answer that does not fit its question raises
ProtocolError and nothing else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from csi_vduse.dataplane.vhost_user.protocol import (
    CONFIG,
    HEADER,
    HEADER_BYTES,
    MAX_TABLE_REGIONS,
    NEED_REPLY,
    NUMBER,
    REGION,
    REPLY,
    VERSION,
    VRING_ADDRESS,
    VRING_STATE,
    BackendRequest,
    Inflight,
    MemoryRegion,
    Request,
    VringAddress,
)
from csi_vduse.errors import ProtocolError

_INFLIGHT: Final = struct.Struct("=QQHH4x")


@dataclass(frozen=True)
class Question:
    """A request and its answer.

    Args:
        request: what is asked or said.
        payload: of the request.
        answer_bytes: of payload of the answer; 0: there is none.
        acknowledged: the answer is a number that says whether it was done (REPLY_ACK); 0: it was.
    """

    request: Request
    payload: bytes
    answer_bytes: int
    acknowledged: bool = False


def encode(question: Question) -> bytes:
    """Encode a request."""
    flags = VERSION | (NEED_REPLY if question.acknowledged else 0)
    return HEADER.pack(question.request, flags, len(question.payload)) + question.payload


def check_answer(header: bytes, question: Question) -> None:
    """Check the first HEADER_BYTES of an answer.

    Raises:
        ProtocolError: it is the answer to something else, or of another length.
    """
    request, flags, size = HEADER.unpack(header[:HEADER_BYTES])
    if request != question.request or flags & ~NEED_REPLY != VERSION | REPLY:
        raise ProtocolError(f"{question.request.name} was answered with request {request}, flags {flags:#x}")
    if size != question.answer_bytes:
        raise ProtocolError(
            f"{question.request.name} was answered with {size} bytes instead of {question.answer_bytes}"
        )


def number(request: Request) -> Question:
    """Ask for a number."""
    return Question(request, b"", NUMBER.size)


def protocol_features(features: int) -> Question:
    """Say which features of the protocol are used; only what comes later is acknowledged."""
    return Question(Request.SET_PROTOCOL_FEATURES, NUMBER.pack(features), 0)


def owner() -> Question:
    """Say that the device is ours."""
    return _said(Request.SET_OWNER, b"")


def features(bits: int) -> Question:
    """Say which features the driver negotiated."""
    return _said(Request.SET_FEATURES, NUMBER.pack(bits))


def changes_channel() -> Question:
    """Give a socket on which the server tells of changes, its descriptor with it."""
    return _said(Request.SET_BACKEND_REQ_FD, b"")


def of_ring(request: Request, index: int, value: int) -> Question:
    """Say a number that belongs to a queue."""
    return _said(request, VRING_STATE.pack(index, value))


def ring_eventfd(request: Request, index: int) -> Question:
    """Give an eventfd for a queue, its descriptor with it."""
    return _said(request, NUMBER.pack(index))


def ring_address(address: VringAddress) -> Question:
    """Say where a ring is."""
    parts = (address.index, address.flags, address.descriptor, address.used, address.available, 0)
    return _said(Request.SET_VRING_ADDR, VRING_ADDRESS.pack(*parts))


def ring_base(index: int) -> Question:
    """Stop a queue and ask where."""
    return Question(Request.GET_VRING_BASE, VRING_STATE.pack(index, 0), VRING_STATE.size)


def memory_table(regions: Sequence[MemoryRegion]) -> Question:
    """Give memory, a descriptor for each region.

    Raises:
        ProtocolError: more regions than a table holds.
    """
    if len(regions) > MAX_TABLE_REGIONS:
        raise ProtocolError(
            f"the driver's memory is in {len(regions)} pieces, and a server takes {MAX_TABLE_REGIONS}",
            hint="give the VM its memory in one piece",
        )
    payload = VRING_STATE.pack(len(regions), 0)
    for region in regions:
        where = (region.guest_address, region.size_bytes, region.user_address, region.mmap_offset)
        payload += REGION.pack(*where)
    return _said(Request.SET_MEM_TABLE, payload)


def config(size_bytes: int) -> Question:
    """Ask for the first bytes of the configuration space."""
    payload = CONFIG.pack(0, size_bytes, 0) + bytes(size_bytes)
    return Question(Request.GET_CONFIG, payload, len(payload))


def inflight(log: Inflight) -> Question:
    """Give an in-flight log, its descriptor with it."""
    where = (log.mmap_size, log.mmap_offset, log.queues, log.queue_size)
    return _said(Request.SET_INFLIGHT_FD, _INFLIGHT.pack(*where))


def _said(request: Request, payload: bytes) -> Question:
    return Question(request, payload, NUMBER.size, acknowledged=True)


def check_change(header: bytes) -> bytes:
    """Check what a server told of a change, HEADER_BYTES; returns the answer that it wants, if any.

    Raises:
        ProtocolError: it tells of something else.
    """
    request, flags, size = HEADER.unpack(header)
    if request != BackendRequest.CONFIG_CHANGE or flags & ~NEED_REPLY != VERSION or size:
        raise ProtocolError(
            f"the server told of a change by request {request}, flags {flags:#x}, {size} bytes"
        )
    return HEADER.pack(request, VERSION | REPLY, NUMBER.size) + NUMBER.pack(0) if flags & NEED_REPLY else b""


def number_in(answer: bytes) -> int:
    """Decode an answer that is a number."""
    return int(NUMBER.unpack(answer)[0])


def base_in(answer: bytes, index: int) -> int:
    """Decode the answer to `ring_base`.

    Raises:
        ProtocolError: it is another queue's, or no place in a split ring.
    """
    answered, base = VRING_STATE.unpack(answer)
    if answered != index or base >= 1 << 16:
        raise ProtocolError(f"queue {index} stopped, said the server, as queue {answered} at {base:#x}")
    return int(base)


def config_in(answer: bytes) -> bytes:
    """Decode the answer to `config`.

    Raises:
        ProtocolError: it is of another place.
    """
    offset, size, _ = CONFIG.unpack_from(answer)
    if offset or size != len(answer) - CONFIG.size:
        raise ProtocolError(f"the server showed {size} bytes at {offset} of its configuration space")
    return answer[CONFIG.size :]
