"""The gRPC server on a CSI socket: services in, a running server out. Knows no service in particular.

The order of the wrappers matters: statuses and logs outside, so that a lock that is taken is answered ABORTED
like every other error.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path

import grpc

from csi_vduse import log
from csi_vduse.agent.server import claim_socket
from csi_vduse.errors import FailedPrecondition
from csi_vduse.services.interceptors import Observe, StatusInterceptor
from csi_vduse.services.locks import LockInterceptor, LockTable

# Adds one service to a server, as the generated add_XServicer_to_server do.
Register = Callable[[grpc.aio.Server], None]

# The sidecars run as other users in other containers, but the directory is theirs and ours alone.
_SOCKET_UMASK = 0o117
_STOP_GRACE_S = 20.0


class CsiServer:
    """A server that is listening.

    Args:
        server: gRPC's.
        socket_path: where it listens; removed at the end.
        locks: has the calls that outlive their callers.
    """

    def __init__(self, server: grpc.aio.Server, socket_path: Path, locks: LockInterceptor) -> None:
        self._server = server
        self._socket_path = socket_path
        self._locks = locks

    async def stop(self, grace_s: float = _STOP_GRACE_S) -> None:
        """Take no more calls, let running ones end, remove the socket.

        Args:
            grace_s: how long running calls may take; what takes longer is left to the next start.
        """
        await self._server.stop(grace_s)
        await self._locks.drain(grace_s)
        self._socket_path.unlink(missing_ok=True)
        log.get().info("CSI socket closed", socket=str(self._socket_path))


async def start_server(
    socket_path: Path,
    services: Iterable[Register],
    *,
    observe: Observe | None = None,
    table: LockTable | None = None,
) -> CsiServer:
    """Serve at `socket_path` until `stop`.

    Args:
        socket_path: a socket left there by a dead process is removed, one that answers is not.
        services: each adds itself to the server.
        observe: is told of every ended call; see interceptors.py.
        table: of locks, shared with what works on volumes beside the calls; None: nothing does.

    Raises:
        FailedPrecondition: another process listens there, the path is not a socket, or it cannot be bound.
        InvalidArgument: the path is too long for a socket.
    """
    try:
        claim_socket(socket_path)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot listen on {socket_path}: {error}", hint="check --endpoint"
        ) from error
    locks = LockInterceptor(table)
    server = grpc.aio.server(interceptors=[StatusInterceptor(observe), locks])
    for register in services:
        register(server)
    before = os.umask(_SOCKET_UMASK)
    try:
        server.add_insecure_port(f"unix:{socket_path}")
        await server.start()
    except RuntimeError as error:  # what gRPC raises when it cannot bind
        raise FailedPrecondition(
            f"cannot listen on {socket_path}: {error}", hint="check --endpoint"
        ) from error
    finally:
        os.umask(before)
    log.get().info("CSI socket open", socket=str(socket_path))
    return CsiServer(server, socket_path, locks)
