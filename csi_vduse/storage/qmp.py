"""A connection to a qemu-storage-daemon's monitor: commands with deadlines, events, and errors in our words.

Built on qemu.qmp. Kept true: no call waits longer than its deadline; a daemon that is away or does not answer
is Unavailable. A command that was given up is not taken back: its late answer must find somebody, or qemu.qmp
would drop the connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from qemu.qmp import (
    ConnectError,
    EventListener,
    ExecInterruptedError,
    ExecuteError,
    QMPClient,
    QMPError,
    Runstate,
)

from csi_vduse.errors import FailedPrecondition, Unavailable, VduseError

DEFAULT_TIMEOUT_S = 30.0
_CONNECT_TIMEOUT_S = 10.0
_HINT = "the storage server starts it again; retry"


class QmpRefused(FailedPrecondition):
    """The daemon answered with an error; its text is the message."""


class Qmp:
    """One connection; `connect` makes it.

    Args:
        client: connected.
        pid: of the daemon.
    """

    def __init__(self, client: QMPClient, pid: int) -> None:
        self._client = client
        self.pid = pid
        self.gone = asyncio.Event()
        self._running: set[asyncio.Task[Any]] = set()
        self._watch = asyncio.create_task(self._watch_connection())

    @classmethod
    async def connect(cls, path: Path) -> Qmp:
        """Connect to the monitor at a unix socket.

        Raises:
            Unavailable: nobody answers there.
        """
        # The library logs what it also raises.
        logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            pid = await _connect(sock, path)
            client = QMPClient("storage")
            await asyncio.wait_for(client.connect(sock), _CONNECT_TIMEOUT_S)
        except (OSError, TimeoutError, ConnectError) as error:
            sock.close()
            raise Unavailable(f"no qemu-storage-daemon answers at {path}: {error!r}", hint=_HINT) from error
        return cls(client, pid)

    async def execute(
        self,
        command: str,
        arguments: Mapping[str, Any] | None = None,
        *,
        timeout_s: float = DEFAULT_TIMEOUT_S,
    ) -> Any:  # noqa: ANN401 - what a command returns is its own affair
        """Run a command and return its answer.

        Raises:
            QmpRefused: the daemon says why it does not.
            Unavailable: the daemon is gone, or did not answer in time.
        """
        task = asyncio.create_task(self._client.execute(command, dict(arguments or {})))
        self._running.add(task)
        task.add_done_callback(self._ended)
        done, _ = await asyncio.wait({task}, timeout=timeout_s)
        if not done:
            raise Unavailable(f"qemu-storage-daemon did not answer {command} within {timeout_s:g} s")
        try:
            return task.result()
        except ExecuteError as error:
            raise QmpRefused(f"{command}: {error}") from error
        except (ExecInterruptedError, QMPError, OSError) as error:
            raise Unavailable(f"qemu-storage-daemon went away during {command}", hint=_HINT) from error

    @asynccontextmanager
    async def events(self, *names: str) -> AsyncIterator[EventListener]:
        """Collect events of these names while the body runs; `wait_for` takes them out."""
        listener = EventListener(names)
        with self._client.listen(listener):
            yield listener

    async def wait_for(
        self, listener: EventListener, wanted: Callable[[Mapping[str, Any]], bool], timeout_s: float
    ) -> bool:
        """Wait for an event whose data is wanted; False if it did not come in time.

        Raises:
            Unavailable: the daemon went away.
        """
        gone = asyncio.create_task(self.gone.wait())
        event: asyncio.Task[Any] | None = None
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        try:
            while (left_s := deadline_s - asyncio.get_running_loop().time()) > 0:
                event = asyncio.create_task(listener.get())
                await asyncio.wait({event, gone}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if event.done():
                    if wanted(event.result().get("data", {})):
                        return True
                    continue
                event.cancel()
                if gone.done():
                    raise Unavailable("qemu-storage-daemon went away", hint=_HINT)
            return False
        finally:
            gone.cancel()
            if event is not None:
                event.cancel()

    async def close(self) -> None:
        """Let go of the daemon, which goes on."""
        with contextlib.suppress(Exception):
            await asyncio.wait_for(self._client.disconnect(), _CONNECT_TIMEOUT_S)
        await self._watch

    async def _watch_connection(self) -> None:
        try:
            while self._client.runstate is Runstate.RUNNING:
                await self._client.runstate_changed()
            with contextlib.suppress(Exception):  # it tells again how the connection ended
                await self._client.disconnect()
        finally:
            self.gone.set()

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: its caller may have gone


async def peer_pid(path: Path) -> int:
    """Return the process id of who listens at a unix socket, whether it answers or not; 0 if nobody does.

    Raises:
        Unavailable: it takes no connections any more.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            return await _connect(sock, path)
        except (FileNotFoundError, ConnectionRefusedError):
            return 0
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"nobody takes a connection at {path}: {error!r}") from error


async def _connect(sock: socket.socket, path: Path) -> int:
    """Connect; returns the process id of who listens (SO_PEERCRED in socket(7): of the call of listen)."""
    sock.settimeout(0)
    await asyncio.wait_for(asyncio.get_running_loop().sock_connect(sock, str(path)), _CONNECT_TIMEOUT_S)
    pid: int = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
    return pid


def is_refusal(error: VduseError, text: str) -> bool:
    """Tell whether the daemon refused with a text that contains `text`."""
    return isinstance(error, QmpRefused) and text in error.message
