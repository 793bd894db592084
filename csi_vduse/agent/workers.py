"""The agent's hold on its workers: asking the spawner for one, finding a living one again, talking to it.

Kept true: a worker is identified by a pidfd; one request at a time is under way on a control socket; after a
missed deadline the socket is replaced, so that a late answer is never taken for another request's.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from csi_vduse import log
from csi_vduse.agent.watch import ProcessWatch, call, connect, wait_readable
from csi_vduse.dataplane import channel, versions
from csi_vduse.dataplane.versions import Hello, hello_from_json
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, Unavailable, VduseError

_PING_TIMEOUT_S = 10.0
_KILL_TIMEOUT_S = 10.0


class Worker:
    """One living or dead worker process.

    Args:
        pid: its number.
        pidfd: owned by this object.
        control: connected control socket, owned by this object.
        listen_path: where it accepts further control connections.
        hello: what it said of itself, or None if it has not answered.
    """

    def __init__(
        self, pid: int, pidfd: int, control: socket.socket, listen_path: str, hello: Hello | None = None
    ) -> None:
        self.pid = pid
        self.hello = hello
        self.on_exit: Callable[[Worker], None] | None = None
        self._control: socket.socket | None = control
        self._listen_path = listen_path
        self._lock = asyncio.Lock()
        self._closed = False
        self._news_fd = -1
        self._watch = ProcessWatch(pid, pidfd, self._exited)

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._watch.alive

    async def call(
        self, message: channel.Message, fds: Sequence[int] = (), *, timeout_s: float
    ) -> channel.Message:
        """Send a request and return the answer; the time that requests before it take counts.

        Raises:
            Unavailable: the worker is dead or has closed its socket.
            DeadlineExceeded: no answer in time.
            VduseError: what the worker reported, as the class that it named.
        """
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                return await self._call(message, fds)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"worker {self.pid} did not answer {message['op']!r} within {timeout_s:g} s"
            ) from error

    async def _call(self, message: channel.Message, fds: Sequence[int]) -> channel.Message:
        if not self.alive:
            raise Unavailable(f"worker {self.pid} is dead")
        if self._control is None:
            self._control, _ = connect(self._listen_path)
        try:
            return await call(self._control, message, fds)
        except (asyncio.CancelledError, Unavailable):
            self._close_control()
            raise
        finally:
            if self._closed:
                self._close_control()

    async def report_to(self, on_news: Callable[[], None], *, timeout_s: float) -> None:
        """Have on_news called, in the event loop, when its stats say something new, and once now; raises as `call`."""
        if self._closed:  # nobody would close the eventfd
            raise Unavailable(f"worker {self.pid} is dead")
        if self._news_fd < 0:
            self._news_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        news_fd = self._news_fd

        def ready() -> None:
            os.eventfd_read(news_fd)
            on_news()

        asyncio.get_running_loop().add_reader(news_fd, ready)
        await self.call({"op": "news"}, [news_fd], timeout_s=timeout_s)

    def listen_at(self, path: Path) -> None:
        """Let it be found at another path, in the place of whoever was found there."""
        Path(self._listen_path).replace(path)
        self._listen_path = str(path)

    async def ended(self) -> None:
        """Wait for the end of the process."""
        await self._watch.ended()

    async def stop(self, *, timeout_s: float) -> None:
        """Let the worker drain, close its device and end; kill it if it does not within timeout_s."""
        with contextlib.suppress(VduseError):
            await self.call({"op": "stop"}, timeout_s=timeout_s)
            if await self._watch.wait(timeout_s):
                self.close()
                return
        await self.kill()

    def shoot(self) -> None:
        """Kill the worker; its death is seen as any."""
        self._watch.signal(signal.SIGKILL)

    async def kill(self) -> None:
        """Kill the worker and wait for its end, after which it holds no descriptor any more.

        Raises:
            DeadlineExceeded: it is stuck in the kernel.
        """
        self.on_exit = None
        self._watch.signal(signal.SIGKILL)
        if not await self._watch.wait(_KILL_TIMEOUT_S):
            raise DeadlineExceeded(f"worker {self.pid} does not end: it is stuck in the kernel")
        self.close()

    def close(self) -> None:
        """Let go of the worker, whatever it does."""
        self.on_exit = None
        self._watch.close()
        self._closed = True
        if self._news_fd >= 0:
            asyncio.get_running_loop().remove_reader(self._news_fd)
            os.close(self._news_fd)
            self._news_fd = -1
        # Else whoever waits for an answer would wait on a descriptor of somebody else.
        if not self._lock.locked():
            self._close_control()

    def _close_control(self) -> None:
        if self._control is not None:
            self._control.close()
            self._control = None

    def _exited(self) -> None:
        if self.on_exit is not None:
            self.on_exit(self)


class WorkerSource(Protocol):
    """Whoever can make a worker: the spawner's client, or a fake."""

    async def spawn(self, listen_path: Path) -> Worker:
        """Start a worker that listens at `listen_path`."""


class SpawnerClient:
    """The agent's end of the spawner's channel.

    Args:
        sock: the channel; owned by this object.
        on_lost: called when the spawner is gone: an agent without a spawner ends.
    """

    def __init__(self, sock: socket.socket, on_lost: Callable[[], None]) -> None:
        self._socket = sock
        self._on_lost = on_lost
        self._lock = asyncio.Lock()
        self._answers: asyncio.Queue[tuple[channel.Message, list[int]] | None] = asyncio.Queue()
        self._exit_codes: dict[int, int] = {}
        self._reader = asyncio.get_running_loop().create_task(self._read())

    def report_ready(self) -> None:
        """Tell the spawner that the agent serves: from now on it is restarted when it ends."""
        channel.send(self._socket, {"op": "ready"})

    def report_leaving(self) -> None:
        """Tell the spawner that another agent takes our place: it starts none while there is one."""
        channel.send(self._socket, {"op": "leaving"})

    def exit_code(self, pid: int) -> int | None:
        """Exit code of a worker that has ended, negative for a signal, if the spawner has told us."""
        return self._exit_codes.get(pid)

    async def spawn(self, listen_path: Path) -> Worker:
        """Start a worker.

        A caller that is cancelled leaves no answer behind, which the next one would take for its own; the worker ends
        with our connection to it.

        Raises:
            Unavailable: the spawner is gone.
            VduseError: it could not fork.
        """
        asked = asyncio.ensure_future(self._spawn(listen_path))
        try:
            return await asyncio.shield(asked)
        except asyncio.CancelledError:
            asked.add_done_callback(_discard)
            raise

    async def _spawn(self, listen_path: Path) -> Worker:
        async with self._lock:
            channel.send(self._socket, {"op": "spawn", "listen_path": str(listen_path)})
            reply = await self._answers.get()
        if reply is None:
            raise Unavailable("the spawner is gone")
        answer, fds = reply
        channel.raise_for_error(answer)
        control, pidfd = fds
        # Forked from where we were forked: it is what we are.
        hello = hello_from_json({**versions.hello(started=False), "pid": answer["pid"]})
        return Worker(hello.pid, pidfd, socket.socket(fileno=control), str(listen_path), hello)

    async def close(self) -> None:
        """Close the channel."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()

    async def _read(self) -> None:
        while True:
            await wait_readable(self._socket.fileno())
            try:
                message, fds = channel.receive(self._socket)
            except VduseError:
                self._answers.put_nowait(None)
                self._on_lost()
                return
            if message.get("op") == "exited":
                self._exit_codes[int(message["pid"])] = int(message["code"])
                while len(self._exit_codes) > 1024:  # the oldest are of no interest to anyone
                    self._exit_codes.pop(next(iter(self._exit_codes)))
            else:
                self._answers.put_nowait((message, fds))


def _discard(asked: asyncio.Future[Worker]) -> None:
    if not asked.cancelled() and asked.exception() is None:
        asked.result().close()


async def find_serving(control_path: Path, next_control_path: Path) -> Worker | None:
    """Return the worker that serves a device, left by an earlier agent, or None; others of the device end.

    There is one path but for a handover, which the earlier agent may have left half-way: then each may have a
    worker, and at most one of them serves. A worker that does not answer may serve.

    Raises:
        DeadlineExceeded: one that has to end is stuck in the kernel.
    """
    found = [await find_worker(path) for path in (next_control_path, control_path)]
    living = [worker for worker in found if worker is not None]
    serving = [worker for worker in living if worker.hello is not None and worker.hello.started]
    if not serving and len(living) == 1 and living[0].hello is None:
        serving = living
    for worker in living:
        if worker not in serving[:1]:
            await worker.kill()
    if not serving:
        return None
    if serving[0] is found[0]:
        serving[0].listen_at(control_path)
    return serving[0]


async def end_workers(*listen_paths: Path) -> None:
    """End whoever listens at these paths; DeadlineExceeded if one is stuck in the kernel."""
    for path in listen_paths:
        if (worker := await find_worker(path)) is not None:
            await worker.kill()


async def find_worker(listen_path: Path) -> Worker | None:
    """Return the living worker that serves at `listen_path`, left by an earlier agent, or None.

    The pidfd is opened before the worker has proved by an answer that it lives, so it stands for that worker.
    """
    try:
        sock, pid = connect(str(listen_path))
    except Unavailable:
        return None
    except DeadlineExceeded as error:
        log.get().error("a worker cannot be asked who it is; end it by hand", error=str(error))
        return None
    try:
        pidfd = os.pidfd_open(pid)
    except OSError:
        sock.close()
        return None
    worker = Worker(pid, pidfd, sock, str(listen_path))
    try:
        worker.hello = hello_from_json(await worker.call({"op": "ping"}, timeout_s=_PING_TIMEOUT_S))
    except Unavailable:
        await worker.kill()  # it hangs up only when it ends
        return None
    except (FailedPrecondition, DeadlineExceeded) as error:
        log.get().warning("a worker does not answer", pid=pid, path=str(listen_path), error=str(error))
        if not worker.alive:
            worker.close()
            return None
    return worker
