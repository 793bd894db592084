"""The process that connects for a worker in jail: to the worker's own server and to no other (src/.../nbd/broker.c).

It is forked from the worker before that gives everything up, touches no byte of what goes through the connections, and
ends with the worker. It stays root, since keys and sockets may be root's, without any capability.
"""

from __future__ import annotations

import os
import signal
import socket
import traceback
from dataclasses import dataclass
from typing import Any

from csi_vduse.dataplane import jail, nbd_config
from csi_vduse.dataplane._engine import lib
from csi_vduse.dataplane.backend_spec import NbdBackend

_FIRST_PRIVATE_FD = 3


@dataclass(frozen=True)
class Broker:
    """What the worker has of it: where it is asked, and a descriptor that becomes readable when it is gone."""

    channel: socket.socket
    alive_fd: int


def fork_broker(backend: NbdBackend) -> Broker:
    """Fork it; only with a single thread, and while we still have what makes the kernel load its TLS."""
    if backend.tls is not None:
        lib.vd_kernel_has_tls()
    keep: list[Any] = []
    config = nbd_config.encode(backend, keep, wait=False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    alive_fd, life_fd = os.pipe()
    with theirs:
        worker = os.getpid()
        if os.fork() == 0:
            _become(config, theirs.fileno(), life_fd, worker)
    os.close(life_fd)
    return Broker(ours, alive_fd)


def _become(config: Any, fd: int, life_fd: int, worker: int) -> None:  # noqa: ANN401 - cffi's pointers have no type
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
            code = -lib.vd_nbd_broker(config, fd)
    except BaseException:  # noqa: BLE001 - the last frame of a process: say what happened and end
        traceback.print_exc()
    finally:
        os._exit(code)
