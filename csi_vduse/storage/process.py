"""The storage server's process: puts the parts together and serves until told to stop.

It needs no service manager: as a container's first process it starts its qemu-storage-daemon, keeps it
running, and stops it when it is told to stop itself.
"""

from __future__ import annotations

import asyncio
import signal

from csi_vduse import log
from csi_vduse.errors import VduseError
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening


def run_storage_server(config: ServerConfig) -> int:
    """Serve until SIGTERM or SIGINT; return the exit code."""
    try:
        asyncio.run(_serve(config))
    except VduseError as error:
        log.get().error("cannot start", error=error.message, hint=error.hint)
        return 1
    return 0


async def _serve(config: ServerConfig) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    server = StorageServer(config)
    async with server.running(), listening(config, server):
        await stop.wait()
