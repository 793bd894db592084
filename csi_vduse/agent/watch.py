"""Waiting, in asyncio, for descriptors that asyncio has no call for: packets with descriptors, and pidfds."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence

from csi_vduse.dataplane import channel
from csi_vduse.errors import DeadlineExceeded, Unavailable


async def wait_readable(fd: int) -> None:
    """Wait until a descriptor is readable; one waiter per descriptor."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def ready() -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(fd, ready)
    try:
        await future
    finally:
        loop.remove_reader(fd)


async def call(sock: socket.socket, message: channel.Message, fds: Sequence[int] = ()) -> channel.Message:
    """Send a request and wait for its answer; raises the error that the answer carries.

    Packets are small against the socket's buffer and one is under way at a time, so sending does not block.
    """
    channel.send(sock, message, fds)
    await wait_readable(sock.fileno())
    answer, received = channel.receive(sock)
    for fd in received:
        os.close(fd)
    channel.raise_for_error(answer)
    return answer


class ProcessWatch:
    """A process seen through a pidfd: whether it lives, and a call-back at once when it ends.

    Owns the pidfd; the number it stands for cannot be reused while it is open.

    Args:
        pid: the number, for logs.
        pidfd: pidfd_open(2).
        on_exit: called once, in the event loop.
    """

    def __init__(self, pid: int, pidfd: int, on_exit: Callable[[], None]) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._on_exit = on_exit
        self._ended = asyncio.Event()
        asyncio.get_running_loop().add_reader(pidfd, self._readable)

    @property
    def alive(self) -> bool:
        """Whether the process has not ended."""
        return not self._ended.is_set()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; fine if it has ended."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def ended(self) -> None:
        """Wait for the end."""
        await self._ended.wait()

    async def wait(self, timeout_s: float) -> bool:
        """Wait for the end; returns whether it came."""
        try:
            await asyncio.wait_for(self._ended.wait(), timeout_s)
        except TimeoutError:
            return False
        return True

    def close(self) -> None:
        """Stop watching."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def _readable(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        self._ended.set()
        self._on_exit()


def connect(path: str) -> tuple[socket.socket, int]:
    """Connect to a worker's control socket; returns the socket and the worker's process number.

    The number is that of the process that listens (unix(7), SO_PEERCRED), not one read from a file.

    Raises:
        Unavailable: nobody listens.
        DeadlineExceeded: somebody listens and has not accepted connections for long: he is stopped, or stuck.
    """
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.settimeout(0)  # with a full backlog the event loop would wait for whoever does not accept
        sock.connect(path)
        sock.settimeout(None)
        credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    except BlockingIOError as error:
        sock.close()
        raise DeadlineExceeded(f"the worker that listens on {path} accepts no connections") from error
    except OSError as error:
        sock.close()
        raise Unavailable(f"no worker listens on {path}: {error.strerror}") from error
    return sock, int.from_bytes(credentials[:4], "little")
