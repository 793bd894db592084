"""The worker process: life cycle and control loop of one volume's data plane.

One thread, one selector: the device's control messages, requests of the agent, alarms of the engine. Queue
threads do the I/O; nothing here is on their path. A worker that serves ends when it is told to stop, never because
the agent went away: the agent finds it again at the path it listens on. One that serves nothing (not yet, or it has
handed its device over) ends with any of its connections: an agent that dies leaves no idle ones behind.

Between opening its backend and serving it gives up whatever else it may do (jail.py): it serves one device in its life.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import signal
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import structlog

from csi_vduse import log
from csi_vduse.dataplane import backend_spec, broker, channel, jail, throttle, versions
from csi_vduse.dataplane.backend_log import BackendLog, tell_fault
from csi_vduse.dataplane.backend_spec import NbdBackend, NullBackend, ServedBackend, VhostUserBackend
from csi_vduse.dataplane.broker import Broker, fork_broker
from csi_vduse.dataplane.device import Device, DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.inflight import InflightLog, LogIdentity
from csi_vduse.dataplane.served import ServedDevice
from csi_vduse.dataplane.vhost_user.mediator import Mediator
from csi_vduse.dataplane.vhost_user.relay import Relay
from csi_vduse.dataplane.vhost_user.relayed import ServerLog
from csi_vduse.errors import (
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    Pending,
    Unavailable,
    VduseError,
)

_ALARM_PAUSE_S = 1.0  # failed requests are logged at most this often
_OOM_SCORE_ADJ = Path("/proc/self/oom_score_adj")


def run_worker(control: socket.socket, listen_path: str) -> int:
    """Serve one volume until told to stop; return the exit code.

    Args:
        control: connected SOCK_SEQPACKET socket of whoever started us; owned by the worker.
        listen_path: where further control connections are accepted; a stale socket there is replaced.
    """
    # The end of a container must not cut requests short before it has to.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        _OOM_SCORE_ADJ.write_text("-1000")
    return Worker(control, listen_path).run()


class Worker:
    """The control loop and what it owns."""

    def __init__(self, control: socket.socket, listen_path: str) -> None:
        self._selector = selectors.DefaultSelector()
        self._log = log.get()
        self._served: ServedDevice | None = None
        self._event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._alarm_muted_until = 0.0
        self._news_fd: int | None = None  # where the agent is told that the stats say something new
        self._backend_log = BackendLog()
        self._resume_at: float | None = None
        self._running = True
        self._jailed = False
        self._broker: Broker | None = None
        self._listener = _listen(listen_path)
        self._watch(self._listener, self._accept)
        self._watch(control, lambda: self._serve_control(control))
        self._watch(self._event_fd, self._alarm)

    def run(self) -> int:
        """Loop until stopped."""
        while self._running:
            for key, _ in self._selector.select(self._next_deadline_s()):
                if self._selector.get_map().get(key.fd) is not key:
                    continue  # what came before it in this turn stopped watching it
                callback: Callable[[], None] = key.data
                callback()
            self._do_what_is_due()
        return 0

    def _watch(self, fileobj: Any, callback: Callable[[], None]) -> None:  # noqa: ANN401 (int or anything with fileno)
        self._selector.register(fileobj, selectors.EVENT_READ, callback)

    # Control requests

    def _accept(self) -> None:
        connection, _ = self._listener.accept()
        self._watch(connection, lambda: self._serve_control(connection))

    def _serve_control(self, sock: socket.socket) -> None:
        try:
            message, fds = channel.receive(sock)
        except InvalidArgument as error:
            message, fds, answer = {}, [], channel.error_answer(error)
        except VduseError:
            self._selector.unregister(sock)  # the agent went away
            sock.close()
            self._running = self._running and self._served is not None
            return
        else:
            try:
                answer = {"ok": True, **self._perform(message, fds)}
            except (VduseError, KeyError, ValueError, TypeError) as error:
                answer = channel.error_answer(error)
        for fd in fds:
            os.close(fd)
        with contextlib.suppress(VduseError):
            channel.send(sock, answer)

    def _perform(self, message: channel.Message, fds: list[int]) -> dict[str, Any]:
        match message.get("op"):
            case "ping":
                return versions.hello(started=self._served is not None)
            case "prepare":
                self._prepare(message, fds)
            case "start":
                self._start(message, fds)
            case "release":
                return {"released": self._release(abandon=bool(message.get("abandon")))}
            case "resize":
                self._device.resize(int(message["capacity_bytes"]))
            case "throttle":
                self._device.engine.set_throttle(throttle.from_json(message["throttle"]))
            case "quiesce":
                self._device.quiesce()
                self._resume_at = time.monotonic() + float(message["hold_s"])
            case "resume":
                self._resume()
            case "stats":
                return self._device.describe()
            case "news":
                self._report_to(fds)
            case "stop":
                self._stop()
            case other:
                raise InvalidArgument(
                    f"unknown request {other!r}", hint="agent and worker are of different versions"
                )
        return {}

    @property
    def _device(self) -> ServedDevice:
        if self._served is None:
            raise FailedPrecondition("this worker has not been started", hint="send it a start request first")
        return self._served

    def _report_to(self, fds: list[int]) -> None:
        """Have an eventfd written when the stats say something new, and now: for what nobody was told of."""
        if len(fds) != 1:
            raise InvalidArgument(f"news came with {len(fds)} descriptors", hint="send an eventfd")
        if self._news_fd is not None:
            os.close(self._news_fd)
        self._news_fd = fds.pop()
        os.eventfd_write(self._news_fd, 1)

    def _prepare(self, message: channel.Message, fds: list[int]) -> None:
        """Do of a start with a log what can be done while another worker serves the device: check, and warm up."""
        (log_fd,) = fds
        InflightLog(log_fd, LogIdentity(**message["inflight"]))
        # Whoever serves the device holds the backend: what counts is that it is there. Servers are heard in jail only.
        backend = backend_spec.from_json(message["backend"])
        if not isinstance(backend, (NbdBackend, VhostUserBackend)):
            with contextlib.suppress(Unavailable):
                self._engine(message, backend).close()
        if _device_spec(message).is_network:
            return
        # A worker shares its pages with the spawner until it writes to them: what a start copies is copied now.
        self._engine(message, NullBackend()).close()

    def _start(self, message: channel.Message, fds: list[int]) -> None:
        if self._served is not None:
            raise FailedPrecondition("this worker serves a device already")
        if self._jailed:
            raise FailedPrecondition("this worker has given up what a start needs", hint="start another one")
        if len(fds) != 2:
            raise InvalidArgument(
                f"start came with {len(fds)} descriptors", hint="send the VDUSE device and the in-flight log"
            )
        structlog.contextvars.bind_contextvars(volume_id=message.get("volume_id", message["serial"]))
        spec, backend = _device_spec(message), backend_spec.from_json(message["backend"])
        device_fd, log_fd = fds
        identity = LogIdentity(**message["inflight"])
        if isinstance(backend, (NbdBackend, VhostUserBackend)):
            hired = fork_broker(backend)
            self._hire(hired)
            self._give_up(device_fd)  # before there is a thread, and before a server is heard
        engine: Engine | Relay | Mediator
        if isinstance(backend, VhostUserBackend):
            dial = functools.partial(broker.dial, hired.channel)
            if backend.mediated:
                inner = self._engine(message, backend)
                engine = Mediator(inner, backend, spec, dial=dial, event_fd=self._event_fd)
            else:
                server_log = None if spec.is_network else ServerLog(log_fd, identity.place)
                engine = Relay(backend, spec, server_log=server_log, dial=dial, event_fd=self._event_fd)
        else:
            engine = self._engine(message, backend)
        with contextlib.ExitStack() as undo:
            undo.callback(engine.close)
            engine.set_throttle(throttle.from_json(message.get("throttle")))
            if not self._jailed:
                self._give_up(device_fd)
            inflight = InflightLog(log_fd, identity)
            served = ServedDevice(
                Device(device_fd, spec.name), engine, spec, inflight, resume=bool(message.get("resume"))
            )
            undo.pop_all()
        fds.remove(device_fd)  # it belongs to served now
        self._served = served
        self._backend_log = BackendLog()
        self._watch(served.device.fd, self._handle_message)
        self._watch_waiting_queues(set())

    def _hire(self, hired: Broker) -> None:
        self._broker = hired
        self._watch(hired.alive_fd, self._lose_broker)

    def _lose_broker(self) -> None:
        """End: nothing could be connected any more. The next worker has its own, and replays what we leave."""
        self._log.error("the broker is gone; another worker takes over")
        self._running = False

    def _give_up(self, device_fd: int) -> None:
        """Go to jail: as a user that is the device's alone."""
        missing = jail.enter(jail.FIRST_USER + os.minor(os.fstat(device_fd).st_rdev))
        self._jailed = True
        if missing:
            self._log.warning("a worker is jailed less than it could be", missing=missing)

    def _engine(self, message: channel.Message, backend: ServedBackend) -> Engine:
        spec = _device_spec(message)
        return Engine(
            backend=backend,
            capacity_bytes=spec.capacity_bytes,
            block_size_bytes=spec.block_size_bytes,
            max_queues=spec.queues,
            queue_size=spec.queue_size,
            read_only=spec.read_only,
            serial=message["serial"],
            event_fd=self._event_fd,
            resume=bool(message.get("resume")),
            broker_fd=self._broker.channel.fileno() if self._broker is not None else None,
        )

    def _release(self, *, abandon: bool) -> bool:
        """Let go of device and backend, with nothing in flight; they are ready for a successor, or a start of ours.

        False if what is in flight does not end in time: then everything goes on as before. To abandon is to let go
        of the device whatever is in flight or held; the backend is let go of at the end of the process.
        """
        served = self._device
        if not abandon:
            if self._resume_at is not None:
                raise Pending("the volume's requests are held", hint="retry when its snapshot has been taken")
            if served.broken:
                raise FailedPrecondition("the kernel has given the device up", hint="detach the volume")
            try:
                served.quiesce()
            except DeadlineExceeded:
                return False
        self._resume_at = None
        for fd in (served.device.fd, *served.waiting_kick_fds):
            if fd in self._selector.get_map():
                self._selector.unregister(fd)
        # Closing is what hands the device over: with the last descriptor the kernel takes back what was not answered.
        served.close()
        served.engine.close()  # and with it the lock on the image falls
        self._served = None
        return True

    def _stop(self) -> None:
        if self._served is not None:
            self._served.close()
            self._served.engine.close()  # a server is told that we go, and does not count us any more
        self._running = False

    # The device and the engine

    def _handle_message(self) -> None:
        served = self._device
        before = set(served.waiting_kick_fds)
        served.handle_message()
        self._watch_waiting_queues(before)
        if served.broken:
            self._selector.unregister(served.device.fd)

    def _watch_waiting_queues(self, before: set[int]) -> None:
        after = self._device.waiting_kick_fds
        for fd in before - after.keys():
            self._selector.unregister(fd)
        for fd in after.keys() - before:
            self._watch(fd, functools.partial(self._kicked_early, fd, after[fd]))

    def _kicked_early(self, fd: int, index: int) -> None:
        os.eventfd_read(fd)
        self._device.start_ready_queue(index)
        if fd not in self._device.waiting_kick_fds:
            self._selector.unregister(fd)

    def _alarm(self) -> None:
        os.eventfd_read(self._event_fd)
        self._selector.unregister(self._event_fd)
        self._alarm_muted_until = time.monotonic() + _ALARM_PAUSE_S
        if self._served is None:
            return
        engine = self._served.engine
        self._backend_log.tell(engine)
        if self._news_fd is not None:
            os.eventfd_write(self._news_fd, 1)
        for queue, fault in engine.faults().items():
            tell_fault(queue, fault)

    # Time

    def _next_deadline_s(self) -> float | None:
        deadlines = [t for t in (self._alarm_muted_until or None, self._resume_at) if t is not None]
        return max(0.0, min(deadlines) - time.monotonic()) if deadlines else None

    def _do_what_is_due(self) -> None:
        now = time.monotonic()
        if self._alarm_muted_until and now >= self._alarm_muted_until:
            self._alarm_muted_until = 0.0
            self._watch(self._event_fd, self._alarm)
        if self._resume_at is not None and now >= self._resume_at:
            self._log.warning("nobody resumed the volume in time; it resumes by itself")
            self._resume()

    def _resume(self) -> None:
        self._resume_at = None
        self._device.resume()


def _device_spec(message: channel.Message) -> DeviceSpec:
    return DeviceSpec(
        name=message["name"],
        capacity_bytes=message["capacity_bytes"],
        block_size_bytes=message["block_size_bytes"],
        queues=message["queues"],
        queue_size=message["queue_size"],
        read_only=message["read_only"],
        packed=message["packed"],
        is_network=message.get("is_network", False),
    )


def _listen(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        Path(path).unlink()
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    listener.bind(path)
    Path(path).chmod(0o600)
    listener.listen(4)
    return listener
