"""The process that connects for a worker in jail: to the worker's own server and to no other.

For NBD it is src/backends/nbd/broker.c, which the engine asks; for vhost-user what is below, which `dial` asks.

It is forked from the worker before that gives everything up, touches no byte of what goes through the connections, and
ends with the worker. It stays root, since keys and sockets may be root's, without any capability.
"""

from __future__ import annotations

import functools
import os
import signal
import socket
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from csi_vduse.dataplane import jail, nbd_config
from csi_vduse.dataplane._engine import lib
from csi_vduse.dataplane.backend_spec import NbdBackend, VhostUserBackend
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.errors import Unavailable, VduseError

_FIRST_PRIVATE_FD = 3
_ANSWER_BYTES: Final = 512  # of a reason; the empty one comes with a connection
_CONNECTION_FDS: Final = 3  # the connection, and both ends of the channel for changes
_ANSWER_TIMEOUT_S: Final = 5.0  # a unix socket connects at once or not


@dataclass(frozen=True)
class Broker:
    """What the worker has of it: where it is asked, and a descriptor that becomes readable when it is gone."""

    channel: socket.socket
    alive_fd: int


def fork_broker(backend: NbdBackend | VhostUserBackend) -> Broker:
    """Fork it; only with a single thread, and while we still have what makes the kernel load its TLS."""
    serve: Callable[[int], int]
    if isinstance(backend, NbdBackend):
        if backend.tls is not None:
            lib.vd_kernel_has_tls()
        keep: list[Any] = []
        serve = functools.partial(lib.vd_nbd_broker, nbd_config.encode(backend, keep, wait=False))
    else:
        serve = functools.partial(_connect_for, backend.socket)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alive_fd, life_fd = os.pipe()
    with theirs:
        worker = os.getpid()
        if os.fork() == 0:
            _become(serve, theirs.fileno(), life_fd, worker)
    os.close(life_fd)
    return Broker(ours, alive_fd)


def dial(channel: socket.socket) -> tuple[socket.socket, frontend.Pair]:
    """Have a vhost-user backend's broker connect, in the worker.

    Raises:
        Unavailable: the server is not there, and why; or the broker is gone.
    """
    channel.settimeout(_ANSWER_TIMEOUT_S)
    try:
        channel.send(b"?")
        reason, fds, _, _ = socket.recv_fds(channel, _ANSWER_BYTES, _CONNECTION_FDS, socket.MSG_CMSG_CLOEXEC)
    except OSError as error:
        raise Unavailable(f"the worker's broker does not answer: {error}") from error
    if len(fds) == _CONNECTION_FDS:
        sock, ours, theirs = (socket.socket(fileno=fd) for fd in fds)
        return sock, (ours, theirs)
    for fd in fds:
        os.close(fd)
    if fds:
        raise Unavailable("the worker has no room for the descriptors of a connection")
    raise Unavailable(reason.decode(errors="replace") or "the worker's broker has ended")


def _connect_for(path: Path, fd: int) -> int:
    with socket.socket(fileno=fd) as channel:
        while channel.recv(1):
            try:
                sock, (ours, theirs) = frontend.dial(path)
            except (VduseError, OSError) as error:
                channel.send(str(error).encode()[:_ANSWER_BYTES])
                continue
            with sock, ours, theirs:
                socket.send_fds(channel, [b"+"], [sock.fileno(), ours.fileno(), theirs.fileno()])
    return 0


def _become(serve: Callable[[int], int], fd: int, life_fd: int, worker: int) -> None:
    """Turn this freshly forked process into the broker; never returns."""
    code = 1
    try:
        # First of all: the device has one holder, or the kernel takes a dead worker's messages for under way.
        first, second = sorted((fd, life_fd))
        os.closerange(_FIRST_PRIVATE_FD, first)
        os.closerange(first + 1, second)
        os.closerange(second + 1, os.sysconf("SC_OPEN_MAX"))
        jail.end_with_parent(signal.SIGKILL)
        if os.getppid() == worker:
            jail.become_broker()
            code = -serve(fd)
    except BaseException:  # noqa: BLE001 - the last frame of a process: say what happened and end
        traceback.print_exc()
    finally:
        os._exit(code)
