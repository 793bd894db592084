"""The process behind a vhost-user socket: one disk, one front-end at a time, in the foreground.

One thread, one selector: the listening socket, the front-end's messages, signals, alarms of the engine. Queue
threads do the I/O; nothing here is on their path. A front-end that leaves, dies or breaks the protocol costs its
session and nothing else: the next one is accepted when its queues have stopped, and starts afresh.
SIGTERM and SIGINT end the server, SIGHUP lets it look how large its backend is by now.
"""

from __future__ import annotations

import contextlib
import os
import resource
import selectors
import signal
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Final

from csi_vduse import log
from csi_vduse.dataplane.backend_log import BackendLog
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.connection import Connection
from csi_vduse.dataplane.vhost_user.session import Session
from csi_vduse.errors import AlreadyExists, InvalidArgument, ProtocolError, Unavailable, VduseError

_ALARM_PAUSE_S: Final = 1.0  # failed requests are logged at most this often
_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
# What libblkio wants to see at least is not written down; 509 is what the kernel's vhost has for QEMU's slots.
_MAX_MEMORY_SLOTS: Final = 509
_FDS_PER_SLOT: Final = 3  # ours, the engine's, and the engine's of the map that is being replaced
_OTHER_FDS: Final = 512


class Server:
    """The control loop and what it owns.

    Args:
        path: of the socket.
        engine: ready, without queues.
        spec: what the disk shows.
        event_fd: the engine's alarm.

    Raises:
        AlreadyExists: another server listens there, or something is there that is no socket.
        InvalidArgument: a socket cannot be made there.
    """

    def __init__(self, path: Path, engine: Engine, spec: DeviceSpec, event_fd: int) -> None:
        self._log = log.get()
        self._path = path
        self._engine = engine
        self._spec = spec
        self._event_fd = event_fd
        self._selector = selectors.DefaultSelector()
        self._session: Session | None = None
        self._alarm_muted_until = 0.0
        self._backend_log = BackendLog()
        self._running = True
        self._memory_slots = _allow_descriptors()
        self._listener = _listen(path)
        self._inode = path.stat().st_ino

    def run(self, ready: Callable[[], None]) -> None:
        """Serve until SIGTERM or SIGINT; the socket is gone then.

        ready: called when a front-end can connect and signals are heeded.
        """
        with _signals() as signals:
            self._watch(signals, lambda: self._handle_signals(signals))
            self._watch(self._listener, self._accept)
            self._watch(self._event_fd, self._alarm)
            try:
                ready()
                while self._running:
                    self._turn()
            finally:
                self._end_session()
                self._selector.close()
                self._remove_socket()

    def _turn(self) -> None:
        for key, _ in self._selector.select(self._next_deadline_s()):
            if key.fd not in self._selector.get_map():
                continue  # an earlier callback of this turn ended the session
            callback: Callable[[], None] = key.data
            callback()
        if self._alarm_muted_until and time.monotonic() >= self._alarm_muted_until:
            self._alarm_muted_until = 0.0
            self._watch(self._event_fd, self._alarm)

    def _watch(self, source: socket.socket | int, callback: Callable[[], None]) -> None:
        self._selector.register(source, selectors.EVENT_READ, callback)

    def _next_deadline_s(self) -> float | None:
        return max(0.0, self._alarm_muted_until - time.monotonic()) if self._alarm_muted_until else None

    # Front-ends

    def _accept(self) -> None:
        try:
            sock, _ = self._listener.accept()
        except OSError as error:
            self._log.warning("a front-end could not be accepted", error=error.strerror)
            return
        connection = Connection(sock)
        try:
            session = Session(connection, self._engine, self._spec, memory_slots=self._memory_slots)
        except OSError as error:
            self._log.error("a front-end could not be served", error=error.strerror)
            connection.close()
            return
        self._session = session
        self._selector.unregister(self._listener)  # the next one waits until this one has gone
        self._watch(sock, self._handle_input)
        self._log.info("front-end connected")

    def _handle_input(self) -> None:
        assert self._session is not None  # noqa: S101 (nothing from outside: it is watched while it is there)
        try:
            self._session.handle_input()
        except Unavailable as error:
            self._log.info("front-end disconnected", reason=str(error))
            self._end_session()
        except ProtocolError as error:
            self._log.error("connection ended: the front-end broke the protocol", error=str(error))
            self._end_session()

    def _end_session(self) -> None:
        if self._session is None:
            return
        self._selector.unregister(self._session.connection.sock)
        self._session.close()
        self._session = None
        self._watch(self._listener, self._accept)

    # Signals and alarms

    def _handle_signals(self, signals: socket.socket) -> None:
        for number in signals.recv(64):
            if number == signal.SIGHUP:
                self._resize()
            elif number in _SIGNALS:
                self._running = False

    def _resize(self) -> None:
        try:
            self._engine.set_capacity(self._spec.capacity_bytes)  # a server is asked anew by that
        except VduseError as error:
            self._log.error("the capacity stays as it is", error=str(error))
            return
        there = self._engine.backend_capacity_bytes
        capacity = there - there % self._spec.block_size_bytes
        if capacity <= self._spec.capacity_bytes:
            self._log.info("the capacity stays as it is", backend_bytes=there)
            return
        try:
            self._engine.set_capacity(capacity)
        except VduseError as error:
            self._log.error("the capacity stays as it is", error=str(error))
            return
        self._spec = replace(self._spec, capacity_bytes=capacity)
        self._log.info("the disk has grown", capacity_bytes=capacity)
        if self._session is not None:
            self._session.resized(self._spec)

    def _alarm(self) -> None:
        os.eventfd_read(self._event_fd)
        self._selector.unregister(self._event_fd)
        self._alarm_muted_until = time.monotonic() + _ALARM_PAUSE_S
        self._backend_log.tell(self._engine)
        if self._session is not None:
            self._session.report_faults(self._engine.faults())

    def _remove_socket(self) -> None:
        self._listener.close()
        with contextlib.suppress(FileNotFoundError):
            if self._path.stat().st_ino == self._inode:
                self._path.unlink()


def _listen(path: Path) -> socket.socket:
    _remove_stale(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
    try:
        listener.bind(str(path))
        listener.listen(4)
    except OSError as error:
        listener.close()
        reason = error.strerror or str(error)
        raise InvalidArgument(f"no socket can be made at {path}: {reason}") from error
    return listener


def _remove_stale(path: Path) -> None:
    """Remove a socket that nobody listens on."""
    if not path.is_socket():
        if path.exists():
            raise AlreadyExists(f"{path} exists and is no socket")
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return
        except BlockingIOError:
            pass  # somebody listens, and is busy
        except OSError as error:
            raise InvalidArgument(f"no socket can be made at {path}: {error.strerror}") from error
    raise AlreadyExists(f"another server listens at {path}", hint="end it, or use another path")


def _allow_descriptors() -> int:
    """Allow as many open files as this process may have; return how many memory regions that is good for."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = _MAX_MEMORY_SLOTS * _FDS_PER_SLOT + _OTHER_FDS
    limit = wanted if hard == resource.RLIM_INFINITY else min(hard, wanted)
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < limit:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
    return max(8, min(_MAX_MEMORY_SLOTS, (limit - _OTHER_FDS) // _FDS_PER_SLOT))


@contextlib.contextmanager
def _signals() -> Iterator[socket.socket]:
    """A socket on which each signal's number arrives."""
    receiver, sender = socket.socketpair()
    with receiver, sender:
        receiver.settimeout(0)
        sender.settimeout(0)
        before = signal.set_wakeup_fd(sender.fileno())
        handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        try:
            yield receiver
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(before)
