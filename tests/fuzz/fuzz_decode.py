"""Bytes of others, decoded: atheris against vhost-user messages of both sides, VDUSE messages and the control channel.

What does not fit is refused with the error that the function says, and its descriptors are closed.
"""

from __future__ import annotations

import array
import contextlib
import os
import socket
import struct
import sys

import atheris

with atheris.instrument_imports(include=["csi_vduse.dataplane", "json"]):
    from csi_vduse.dataplane import channel, messages
    from csi_vduse.dataplane.device import MAX_QUEUES, DeviceSpec
    from csi_vduse.dataplane.vhost_user import protocol, requests
    from csi_vduse.dataplane.vhost_user.offer import Offer
    from csi_vduse.dataplane.vhost_user.protocol import ProtocolFeature
from csi_vduse.errors import FailedPrecondition, InvalidArgument, ProtocolError, Unavailable, VduseError

FDS = [os.eventfd(0), os.eventfd(0)]
OURS, THEIRS = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
LOWEST_FREE = os.dup(0)
os.close(LOWEST_FREE)


def vhost_user(raw: bytes) -> None:
    """A header and a payload, which need not be as long as the header says."""
    with contextlib.suppress(ProtocolError):
        header = protocol.decode_header(raw[1:13])
        protocol.decode(header, raw[13:], raw[0] % 10)


def server(raw: bytes) -> None:
    """What a vhost-user server answers: a header, and what its configuration space shows."""
    with contextlib.suppress(ProtocolError):
        requests.check_answer(raw[:12].ljust(12, b"\0"), requests.ring_base(0))
    with contextlib.suppress(ProtocolError):
        requests.base_in(raw[:8].ljust(8, b"\0"), 0)
    with contextlib.suppress(ProtocolError, FailedPrecondition):
        answer = raw[:72].ljust(72, b"\0")
        features, protocol_features, queues = struct.unpack_from("=QQQ", answer)
        said = Offer(
            features, ProtocolFeature(protocol_features & Offer.wanted), queues, requests.config_in(answer)
        )
        said.check(read_only=bool(raw[:1]), without_flush=True, keeps_log=bool(raw[1:2]))
        DeviceSpec("disk", said.capacity_bytes, said.block_size_bytes, queues=min(said.queues, MAX_QUEUES))
        said.device_config(min(said.queues, MAX_QUEUES), said.capacity_bytes)


def vduse(raw: bytes) -> None:
    """The kernel always sends whole messages, of any content."""
    packet = raw[: messages.MESSAGE_BYTES].ljust(messages.MESSAGE_BYTES, b"\0")
    request = messages.decode(packet)
    answer = messages.encode_queue_state(request.request_id, 0, 0, packed=bool(raw[:1]))
    if struct.unpack_from("=I", answer)[0] != request.request_id:
        raise RuntimeError("an answer to another request")


def control(raw: bytes) -> None:
    """A packet with descriptors, and an answer that carries an error."""
    if not raw:
        return
    fds = FDS[: raw[0] % 3]
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    repeat = min(1 + raw[0] // 3 * 64, channel.MAX_PACKET_BYTES // len(raw))
    THEIRS.sendmsg([raw[1:] * repeat], ancillary)
    try:
        message, received = channel.receive(OURS)
    except (InvalidArgument, Unavailable):
        received = []
    else:
        with contextlib.suppress(VduseError):
            channel.raise_for_error(message)
    for fd in received:
        os.close(fd)
    lowest = os.dup(0)
    os.close(lowest)
    if lowest != LOWEST_FREE:
        raise RuntimeError("a descriptor was left open")


TARGETS = (vhost_user, vduse, control, server)


def one_input(raw: bytes) -> None:
    """Decode one input as one of them."""
    if raw:
        TARGETS[raw[0] % len(TARGETS)](raw[1:])


def main() -> None:
    """Fuzz until the options of libFuzzer say that it is enough."""
    OURS.settimeout(5)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
