"""Bytes of others, decoded: atheris against vhost-user messages, VDUSE messages and the control channel.

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
    from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.errors import InvalidArgument, ProtocolError, Unavailable, VduseError

FDS = [os.eventfd(0), os.eventfd(0)]
OURS, THEIRS = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
LOWEST_FREE = os.dup(0)
os.close(LOWEST_FREE)


def vhost_user(raw: bytes) -> None:
    """A header and a payload, which need not be as long as the header says."""
    with contextlib.suppress(ProtocolError):
        header = protocol.decode_header(raw[1:13])
        protocol.decode(header, raw[13:], raw[0] % 10)


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


TARGETS = (vhost_user, vduse, control)


def one_input(raw: bytes) -> None:
    """Decode one input as one of the three."""
    if raw:
        TARGETS[raw[0] % len(TARGETS)](raw[1:])


def main() -> None:
    """Fuzz until the options of libFuzzer say that it is enough."""
    OURS.settimeout(5)
    atheris.Setup(sys.argv, one_input)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
