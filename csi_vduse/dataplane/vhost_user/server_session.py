"""A vhost-user server that is followed by another one when it dies, and what each of them works on.

One thread does all that waits for the server; it brings what the server does to what is wanted, step by step, so that it
makes no difference where a server died. What others call only says what is wanted, and waits a bounded time.

Kept true:
- The server has the memory while a ring of it is started, and not longer: without one there is no connection.
- Memory, and the queues that there is a log of, change only while the server works on no ring.
"""

from __future__ import annotations

import contextlib
import functools
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, Final

from csi_vduse import log
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import BackendStatus
from csi_vduse.dataplane.vhost_user.frontend import FrontEnd, Pair
from csi_vduse.dataplane.vhost_user.net_offer import NetOffer
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.dataplane.vhost_user.protocol import VringAddress
from csi_vduse.dataplane.vhost_user.relayed import Memory, Ring, ServerLog
from csi_vduse.errors import FailedPrecondition, ProtocolError, Unavailable, VduseError

_RETRY_S: Final = 0.05  # after a loss; twice as long after each failure
_RETRY_MAX_S: Final = 2.0
_CAPACITY_TIMEOUT_S: Final = 12.0


class ServerSession:
    """A server, and the rings that it works on.

    Args:
        backend: where it is.
        spec: what the device shows.
        dial: makes a connection to the server; as frontend.dial.
        event_fd: eventfd that is written when the connection's state changes.
        server_log: that the servers keep, if they are to.
    """

    fences: Final = False  # what a server has not finished may still reach the driver's memory

    def __init__(
        self,
        backend: VhostUserBackend,
        spec: DeviceSpec,
        *,
        dial: Callable[[], tuple[socket.socket, Pair]],
        event_fd: int,
        server_log: ServerLog | None = None,
    ) -> None:
        self._backend = backend
        self._spec = spec
        self._server_log = server_log
        self._dial = dial
        self._event_fd = event_fd
        self._log = log.get()
        self._changed = threading.Condition()
        self._rings: dict[int, Ring] = {}
        self._gone: list[Ring] = []  # whose descriptors the thread may be using
        self._memory = Memory()
        self._given = Memory()  # what the server has
        self._link: FrontEnd | None = None
        self._new_link: FrontEnd | None = None  # that is not ready yet
        self._unsure = False  # the last server was left by us, and may still be at the driver's memory
        self._capacity_bytes: int | None = spec.capacity_bytes  # of the server's disk; None: to be asked for
        self._shown_bytes = spec.capacity_bytes
        self._whole = False  # what changed had been shown whole
        self._grown_bytes = 0  # what the server said its disk has become, where that is shown whole
        self._features = 0
        self._logged_queues = 0  # that the server has been told of, and has the log of
        self._state, self._reason = "connected", ""
        self._connects = self._failures = self._losses = 0
        self._retry_s, self._retry_at = _RETRY_S, 0.0
        self._closing = False
        self._wake_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="vhost-user", daemon=True)

    # What the rings' owner does, on the thread; `stopped` with the lock held

    def features_of(self, _offer: Offer) -> int:
        """What to use of what a server offers."""
        raise NotImplementedError

    def check(self, offer: Offer) -> None:
        """Refuse a server that cannot do what is wanted of it: FailedPrecondition."""

    def base_of(self, ring: Ring) -> int:
        """Where a server is to begin."""
        raise NotImplementedError

    def started(self, ring: Ring) -> None:
        """A server works on the ring from now on."""

    def stopped(self, ring: Ring) -> None:
        """No server does."""

    # What is wanted

    @contextlib.contextmanager
    def at_once(self) -> Iterator[None]:
        """Have what is called in between seen by the server in one piece."""
        with self._changed:
            yield

    def set_memory(self, memory: Memory) -> None:
        """Replace the memory, which is ours from here on."""
        with self._changed:
            old, self._memory = self._memory, memory
            if self._given is not old:
                old.close()
            self._wake()

    def add_ring(self, ring: Ring, features: int) -> None:
        """Have the server work on a ring, as soon as it is there."""
        with self._changed:
            self._features = features
            self._rings[ring.index] = ring
            self._wake()

    def unwant_ring(self, index: int, timeout_s: float) -> bool:
        """Take a ring from the server; False if that may still be at the driver's memory after timeout_s."""
        with self._changed:
            ring = self._rings[index]
            ring.wanted = False
            self._wake()
            self._changed.wait_for(lambda: not ring.served, timeout_s)
            return ring.drained or not (ring.served or self._unsure)

    def want_ring(self, index: int) -> None:
        """Give a ring back to the server."""
        with self._changed:
            self._rings[index].wanted = True
            self._wake()

    def remove_ring(self, index: int) -> None:
        """Forget a ring."""
        with self._changed:
            self._gone.append(self._rings.pop(index))
            self._wake()

    def check_capacity(self, capacity_bytes: int) -> None:
        """See that the server's disk has so many bytes.

        Raises:
            FailedPrecondition: it is smaller.
            Unavailable: it did not say what size it has.
        """
        with self._changed:
            self._capacity_bytes = None
            self._wake()
            if not self._changed.wait_for(self._knows_capacity, _CAPACITY_TIMEOUT_S):
                raise Unavailable("the vhost-user server did not say its size", hint="retry")
            found = self._capacity_bytes or 0
        if found < capacity_bytes:
            raise FailedPrecondition(
                f"capacity {capacity_bytes} is more than the {found} bytes of the server's disk",
                hint="grow it there first",
            )
        self._shown_bytes = capacity_bytes

    def grown_bytes(self) -> int:
        """Size that the server said its disk has become, to be shown; 0: it has not grown, or was not shown whole."""
        return self._grown_bytes if self._grown_bytes > self._shown_bytes else 0

    def backend_status(self) -> BackendStatus:
        """Return how the connection is."""
        with self._changed:
            return BackendStatus(self._state, self._reason, self._connects, self._failures)

    def remote_stats(self) -> dict[str, Any]:
        """Return what can be told of the connection, in the shape of RemoteStats in agent.proto."""
        status = self.backend_status()
        return {
            "state": status.state,
            "reason": status.reason,
            "connects": status.connects,
            "failures": status.failures,
            "losses": self._losses,
            "connected": int(self._link is not None),
        }

    def leave(self, reason: str) -> None:
        """Leave the server of now, for what it did."""
        with self._changed:
            self._unsure |= self._link is not None
            if self._link is not None:
                self._log.error("the vhost-user server is left", reason=reason)
                self._link.shut()

    def begin(self) -> None:
        """Let the thread run."""
        self._thread.start()

    def end(self) -> None:
        """Let go of the server and of the memory; rings that it still works on are cut off."""
        with self._changed:
            self._closing = True
            self._wake()
            for link in (self._link, self._new_link):
                if link is not None:
                    link.shut()
        self._thread.join()
        for ring in (*self._rings.values(), *self._gone):
            ring.close()
        self._rings.clear()
        self._memory.close()
        os.close(self._wake_fd)

    def _knows_capacity(self) -> bool:
        return self._capacity_bytes is not None

    def _wake(self) -> None:
        os.eventfd_write(self._wake_fd, 1)

    # The thread

    def _run(self) -> None:
        while True:
            with self._changed:
                if self._closing:
                    break
                while self._gone:
                    self._gone.pop().close()
                step = self._next_step()
            try:
                if step is None:
                    self._wait()
                else:
                    step()
            except (VduseError, OSError) as error:
                self._lose(error)
        self._drop_link()

    def _next_step(self) -> Callable[[], None] | None:
        """What the server does not do yet and is to do, or the other way round; with the lock held."""
        link, rings = self._link, self._rings.values()
        if link is None:
            due = self._needs_link() and time.monotonic() >= self._retry_at
            return self._connect if due else None
        queues = max(self._rings, default=-1) + 1
        grown, moved = queues > self._logged_queues, self._given is not self._memory
        step: Callable[[], None] | None = None
        if leaving := [r for r in rings if r.served and (grown or moved or not r.wanted)]:
            step = functools.partial(self._stop, link, leaving[0])
        elif not self._knows_capacity():
            step = functools.partial(self._look, link)
        elif not self._rings:
            step = self._drop_link
        elif grown:
            step = functools.partial(self._give_log, link, queues)
        elif moved:
            step = functools.partial(self._give_memory, link)
        elif coming := [r for r in rings if r.wanted and not r.served]:
            step = functools.partial(self._start, link, coming[0])
        return step

    def _needs_link(self) -> bool:
        return not self._knows_capacity() or any(ring.wanted for ring in self._rings.values())

    def _connect(self) -> None:
        link = FrontEnd(*self._dial())
        with self._changed:
            self._new_link = link
            if self._closing:
                link.shut()
        try:
            offer = link.negotiate(NetOffer if self._spec.is_network else Offer)
            offer.check(
                read_only=self._spec.read_only,
                without_flush=self._backend.without_flush,
                keeps_log=self._server_log is not None,
            )
            self._check_fits(offer)
            link.set_features(offer.server_features(self.features_of(offer)))
            if offer.tells_changes:
                link.open_changes()
        except BaseException:
            link.close()
            raise
        finally:
            with self._changed:
                self._new_link = None
        with self._changed:
            self._link, self._capacity_bytes = link, offer.capacity_bytes
            self._logged_queues = 0
            self._unsure = False  # it answers, and does one thing after the other
            self._connects += 1
            self._set_status("connected", "")
            self._changed.notify_all()

    def _check_fits(self, offer: Offer) -> None:
        self.check(offer)
        if offer.queues < self._spec.queues:
            raise FailedPrecondition(
                f"the server has {offer.queues} queues, the device has {self._spec.queues}"
            )
        if offer.capacity_bytes < self._spec.capacity_bytes:
            raise FailedPrecondition(
                f"the server's disk has {offer.capacity_bytes} bytes, the volume {self._spec.capacity_bytes}"
            )

    def _look(self, link: FrontEnd) -> None:
        capacity_bytes = Offer.capacity_in(link.config())
        with self._changed:
            self._capacity_bytes = capacity_bytes
            self._changed.notify_all()
            if self._whole:
                self._whole, self._grown_bytes = False, capacity_bytes
                self._log.info("the vhost-user server's disk has another size", capacity_bytes=capacity_bytes)
                os.eventfd_write(self._event_fd, 1)

    def _give_log(self, link: FrontEnd, queues: int) -> None:
        """Give the log of these queues and no others: rte_vhost serves none until all that it has a log of are there."""
        if self._server_log is not None:
            place = self._server_log.place
            size_bytes = queues * place.mmap_size // place.queues
            link.set_inflight(replace(place, queues=queues, mmap_size=size_bytes), self._server_log.fd)
        self._logged_queues = queues

    def _give_memory(self, link: FrontEnd) -> None:
        with self._changed:
            before, memory = self._given, self._memory
            self._given = memory
        before.close()
        link.set_memory(memory.regions)

    def _start(self, link: FrontEnd, ring: Ring) -> None:
        address, memory = ring.address, self._given
        with self._changed:
            if self._rings.get(ring.index) is not ring or not ring.wanted or memory is not self._memory:
                return
            ring.served, ring.drained = True, False
        base = self.base_of(ring)
        where = VringAddress(ring.index, 0, address.desc_iova, address.device_iova, address.driver_iova)
        link.start_ring(address.size, base, where, call_fd=ring.call_fd, kick_fd=ring.kick_fd)
        self.started(ring)
        self._retry_s = _RETRY_S
        self._log.info("the server works on a queue", queue=ring.index, base=base)

    def _stop(self, link: FrontEnd, ring: Ring) -> None:
        base = link.stop_ring(ring.index)
        with self._changed:
            ring.base, ring.served, ring.drained = base, False, True
            self.stopped(ring)
            self._changed.notify_all()

    def _wait(self) -> None:
        """Until something is wanted, the server says something, or it is time to try again."""
        with self._changed:
            link, timeout_s = self._link, None
            if link is None and self._needs_link():
                timeout_s = max(0.0, self._retry_at - time.monotonic())
        watched: list[Any] = [self._wake_fd]
        if link is not None:
            watched += [sock for sock in (link.sock, link.changes) if sock is not None]
        ready, _, _ = select.select(watched, [], [], timeout_s)
        if self._wake_fd in ready:
            os.eventfd_read(self._wake_fd)
        if link is not None and link.sock in ready:
            link.listen()
        if link is not None and link.changes in ready:
            link.take_change()
            with self._changed:
                self._whole |= self._capacity_bytes == self._shown_bytes
                self._capacity_bytes = None  # to be asked for

    def _lose(self, error: VduseError | OSError) -> None:
        """The server is away, or not what it should be: what it worked on waits for the next one."""
        refused = isinstance(error, (FailedPrecondition, ProtocolError))
        had = self._link is not None
        self._drop_link()
        with self._changed:
            self._unsure |= had and not isinstance(error, Unavailable)
            self._losses += had
            self._failures += not had
            self._retry_at = time.monotonic() + self._retry_s
            self._retry_s = min(2 * self._retry_s, _RETRY_MAX_S)
            if not self._closing:
                self._set_status("refused" if refused else "connecting", str(error))

    def _drop_link(self) -> None:
        with self._changed:
            link, self._link = self._link, None
            if self._given is not self._memory:
                self._given.close()
            self._given = Memory()
            for ring in self._rings.values():
                ring.served = False
                self.stopped(ring)
            self._changed.notify_all()
        if link is not None:
            link.close()

    def _set_status(self, state: str, reason: str) -> None:
        if (state, reason) != (self._state, self._reason):
            self._state, self._reason = state, reason
            os.eventfd_write(self._event_fd, 1)
