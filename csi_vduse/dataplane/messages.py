"""Control messages of the kernel: decode a request, encode the answer (include/uapi/linux/vduse.h).

Pure functions. The kernel refuses an answer whose reserved bytes are not zero or whose id it does not know.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

MESSAGE_BYTES: Final = 152

GET_VQ_STATE: Final = 0
SET_STATUS: Final = 1
UPDATE_IOTLB: Final = 2
SET_VQ_GROUP_ASID: Final = 3

STATUS_DRIVER_OK: Final = 4
STATUS_FEATURES_OK: Final = 8

_REQUEST = struct.Struct("=II16x128s")  # type, request_id, reserved, payload
_RESPONSE = struct.Struct("=II16x128s")  # request_id, result, reserved, payload


@dataclass(frozen=True)
class GetQueueState:
    """The kernel wants to know how far a queue has been fetched."""

    request_id: int
    index: int


@dataclass(frozen=True)
class SetStatus:
    """The driver writes the device status; 0 is a reset (VIRTIO 1.3, 2.1)."""

    request_id: int
    status: int


@dataclass(frozen=True)
class UpdateIotlb:
    """The driver's address map has changed in [start, last]; only vhost_vdpa sends this."""

    request_id: int
    start: int
    last: int


@dataclass(frozen=True)
class Other:
    """A message that does not matter to a device with one group of queues, or that we do not know."""

    request_id: int
    type: int


Request = GetQueueState | SetStatus | UpdateIotlb | Other


def decode(packet: bytes) -> Request:
    """Decode one message as read from the device.

    Raises:
        struct.error: not MESSAGE_BYTES long, which the kernel never does.
    """
    kind, request_id, payload = _REQUEST.unpack(packet)
    match kind:
        case 0:
            return GetQueueState(request_id, struct.unpack_from("=I", payload)[0])
        case 1:
            return SetStatus(request_id, payload[0])
        case 2:
            return UpdateIotlb(request_id, *struct.unpack_from("=QQ", payload))
    return Other(request_id, kind)


def encode_answer(request_id: int, *, ok: bool = True, payload: bytes = b"") -> bytes:
    """Encode the answer to a message; a status that is not accepted stays what it was (ok=False)."""
    return _RESPONSE.pack(request_id, 0 if ok else 1, payload)


def encode_queue_state(request_id: int, index: int, state: int, *, packed: bool = False) -> bytes:
    """Encode the answer to GetQueueState; state as in ``struct vd_queue_config``, decl/engine.h."""
    if not packed:
        return encode_answer(request_id, payload=struct.pack("=IH", index, state & 0xFFFF))
    fields = (state >> 15 & 1, state & 0x7FFF, state >> 31 & 1, state >> 16 & 0x7FFF)
    return encode_answer(request_id, payload=struct.pack("=I4H", index, *fields))
