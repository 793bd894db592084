"""The life of a process in a cluster: connect, serve until SIGTERM or SIGINT, leave in order."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager

from csi_vduse import log
from csi_vduse.errors import VduseError
from csi_vduse.kube.api import ApiServer, connect

Serve = Callable[[ApiServer], AbstractAsyncContextManager[object]]


def run_until_told(serve: Serve, kubeconfig: str | None = None) -> int:
    """Serve until told to stop; return the exit code.

    Args:
        serve: entered with a connection, left when told.
        kubeconfig: path of one; None: see kube.api.connect.
    """
    try:
        asyncio.run(_until_told(serve, kubeconfig))
    except VduseError as error:
        log.get().error("cannot start", error=error.message, hint=error.hint)
        return 1
    return 0


async def _until_told(serve: Serve, kubeconfig: str | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    api = await connect(kubeconfig)
    try:
        async with serve(api):
            log.get().info("serving")
            await stop.wait()
            log.get().info("stopping")
    finally:
        await api.close()
