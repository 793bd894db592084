"""One JSON object and some file descriptors per packet, between spawner, agent and worker.

The transport is AF_UNIX SOCK_SEQPACKET: packets keep their boundaries and descriptors travel with the
packet that speaks of them (unix(7), SCM_RIGHTS). A request is ``{"op": NAME, ...}``; an answer is
``{"ok": true, ...}`` or ``{"ok": false, "error": CLASS, "message": ..., "hint": ...}``, where CLASS is a name
from csi_vduse.errors.
Both ends are programs of ours, of possibly different versions: unknown keys are ignored.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Sequence
from typing import Any

from csi_vduse import errors
from csi_vduse.errors import InvalidArgument, Unavailable, VduseError

MAX_PACKET_BYTES = 64 * 1024
MAX_FDS = 32

Message = dict[str, Any]


def send(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> None:
    """Send one message; the descriptors stay open on our side.

    Raises:
        Unavailable: the other end is gone.
    """
    payload = json.dumps(message, separators=(",", ":")).encode()
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds).tobytes())] if fds else []
    try:
        sock.sendmsg([payload], ancillary)
    except (BrokenPipeError, ConnectionResetError, ConnectionRefusedError) as error:
        raise Unavailable(f"the other end of the control channel is gone: {error.strerror}") from error


def receive(sock: socket.socket) -> tuple[Message, list[int]]:
    """Wait for one message; received descriptors are close-on-exec and belong to the caller.

    Raises:
        Unavailable: the other end closed the channel.
        InvalidArgument: the packet is not one of ours; its descriptors are closed.
        TimeoutError: the socket has a timeout and it passed.
    """
    space = socket.CMSG_LEN(MAX_FDS * array.array("i").itemsize)
    try:
        payload, ancillary, flags, _ = sock.recvmsg(MAX_PACKET_BYTES, space, socket.MSG_CMSG_CLOEXEC)
    except ConnectionResetError as error:
        raise Unavailable("the other end of the control channel is gone") from error
    fds = array.array("i")
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
    if not payload:
        _close(fds)
        raise Unavailable("the other end of the control channel is gone")
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise InvalidArgument(
                f"control message longer than {MAX_PACKET_BYTES} bytes or {MAX_FDS} descriptors"
            )
        message = json.loads(payload)
        if not isinstance(message, dict):
            raise InvalidArgument("control message is not a JSON object")
    except (ValueError, RecursionError, InvalidArgument) as error:  # json recurses as deep as the text does
        _close(fds)
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(f"control message is not JSON: {error}") from error
    return message, list(fds)


def call(sock: socket.socket, message: Message, fds: Sequence[int] = ()) -> Message:
    """Send a request, wait for its answer, and raise the error that it carries, if any.

    Raises:
        VduseError: what the other end reported, as the class it named.
    """
    send(sock, message, fds)
    answer, received = receive(sock)
    _close(received)
    raise_for_error(answer)
    return answer


def raise_for_error(answer: Message) -> None:
    """Raise the error that an answer carries; do nothing for a good one."""
    if answer.get("ok"):
        return
    kind = getattr(errors, str(answer.get("error")), VduseError)
    if not (isinstance(kind, type) and issubclass(kind, VduseError)) or kind is errors.CommandFailed:
        kind = VduseError
    raise kind(str(answer.get("message", "no message")), hint=str(answer.get("hint", "")))


def error_answer(error: Exception) -> Message:
    """Describe an exception as an answer that ``raise_for_error`` can raise again elsewhere."""
    if isinstance(error, VduseError):
        return {"ok": False, "error": type(error).__name__, "message": error.message, "hint": error.hint}
    return {"ok": False, "error": "VduseError", "message": f"{type(error).__name__}: {error}", "hint": ""}


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
