"""One queue: what the front-end has said about it, and its life in the engine.

A ring runs from the moment on which everything is known (size, addresses, kick, enabled) until GET_VRING_BASE.
The protocol lets a back-end wait for the first kick; not waiting does the same for a disk, since a request is there
or is not, and saves what a front-end had queued before it reconnected and kicks for no more.

Kept true:
- A ring that is started where a predecessor died serves again what its in-flight log says was in flight. One that
  was stopped by us with nothing in flight starts its log afresh, since its driver may have been reset meanwhile.
- The engine never waits for a front-end: its eventfds are made non-blocking, since a counter that was driven to its
  limit would block a write for ever. A kick is only polled, never read or written.
- The engine's notify descriptor is one of ours for the ring's whole life. SET_VRING_CALL, which QEMU sends
  whenever a guest masks an interrupt, puts another file behind that number (dup2) while requests go on.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from pathlib import Path
from typing import Final

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.engine import Engine, QueueAddress
from csi_vduse.dataplane.vhost_user.inflight import InflightLog, count, is_begun
from csi_vduse.dataplane.vhost_user.memory import MemoryTable
from csi_vduse.dataplane.vhost_user.protocol import MAX_QUEUE_SIZE, VringAddress
from csi_vduse.errors import ProtocolError

_EVENTFD: Final = "anon_inode:[eventfd]"


class Ring:
    """A queue; owns its eventfds."""

    def __init__(self, index: int, engine: Engine) -> None:
        self.index = index
        self.running = False
        self.abandoned = False  # what it left behind may still reach the front-end's memory
        self.fault_reported = False
        self.served_again = 0  # requests that the last start found in the in-flight log
        self._engine = engine
        self._call_fd = _new_eventfd()
        self._kick_fd: int | None = None
        self._error_fd: int | None = None
        self._size = 0
        self._base = 0
        self._address: VringAddress | None = None
        self._log_file: InflightLog | None = None
        self._used_log: InflightLog | None = None  # by the engine, which has an address in it
        self._settled = False  # the log says that nothing is in flight, as we stopped the ring ourselves
        self._enabled: bool | None = None  # as long as nobody said: as the features have it
        self._started_at: tuple[int, int, int] | None = None

    # What the front-end says. A change of what the engine was started with takes effect at the next start.

    def set_size(self, size: int) -> None:
        """Set the number of entries; stops the ring."""
        if not 0 < size <= MAX_QUEUE_SIZE or size & (size - 1):
            raise ProtocolError(f"queue {self.index} with {size} entries")
        self.halt()
        self._size = size

    def set_address(self, address: VringAddress) -> None:
        """Set where the ring is; stops it if that is elsewhere than before."""
        if address.flags:
            raise ProtocolError(f"flags {address.flags:#x} with the addresses of queue {self.index}")
        if address != self._address:
            self.halt()
        self._address = address

    def set_base(self, base: int, *, packed: bool) -> None:
        """Set where fetching goes on (a packed ring has two such places in one number); stops the ring."""
        if base >= 1 << 16 and not packed:
            raise ProtocolError(f"queue {self.index} with base {base:#x}")
        self.halt()
        self._base = base

    def set_kick(self, fd: int) -> None:
        """Set the eventfd that the driver's kicks write to; stops the ring, takes the descriptor."""
        check_eventfd(fd)
        self.halt()
        self._drop_kick()
        self._kick_fd = fd

    def set_call(self, fd: int | None) -> None:
        """Set the eventfd that interrupts the driver, None for nothing; takes the descriptor."""
        if fd is None:
            fd = _new_eventfd()
        else:
            check_eventfd(fd)
        os.dup2(fd, self._call_fd, inheritable=False)
        os.close(fd)

    def set_error(self, fd: int | None) -> None:
        """Set the eventfd that says that the ring has stopped for good, None for nothing; takes the descriptor."""
        if fd is not None:
            check_eventfd(fd)
        if self._error_fd is not None:
            os.close(self._error_fd)
        self._error_fd = fd

    def set_enabled(self, enabled: bool, timeout_s: float) -> bool:  # noqa: FBT001 (as the message has it)
        """Let requests be taken or not; False if some are still in flight after timeout_s."""
        self._enabled = enabled
        if not self.running:
            return True
        if enabled:
            self._engine.resume_queue(self.index)
            return True
        return self.pause(timeout_s)

    def set_log(self, log_file: InflightLog) -> None:
        """Set the in-flight log; takes effect at the next start."""
        self._log_file = log_file
        self._settled = False

    # Its life in the engine

    def start_if_ready(self, features: int, memory: MemoryTable, *, enabled_by_default: bool) -> bool:
        """Start if everything is known; True if it started.

        Raises:
            ProtocolError: it is not in the front-end's memory.
            VduseError: the engine cannot serve it.
        """
        enabled = enabled_by_default if self._enabled is None else self._enabled
        if self.running or not enabled or not self._size or self._kick_fd is None or not memory.regions:
            return False
        where = self._where(memory)
        if where is None:
            return False
        descriptor, driver, device = where
        log_file = self._log_file
        part = log_file.part(self.index) if log_file else None
        resume = part is not None and is_begun(part) and not self._settled
        packed = bool(features & config_space.F_RING_PACKED)
        self.served_again = count(part, packed=packed) if part is not None and resume else 0
        self._engine.start_queue(
            self.index,
            QueueAddress(
                features=features,
                size=self._size,
                desc_iova=descriptor,
                driver_iova=driver,
                device_iova=device,
                state=self._base,
                resume=resume,
                inflight=part,
                kick_fd=self._kick_fd,
                notify_fd=self._call_fd,
                notify_ioctl=0,
            ),
        )
        self.running = True
        self._used_log = log_file
        self.fault_reported = False
        self._started_at = where
        _signal(self._call_fd)  # for what an earlier back-end completed and told nobody
        return True

    def pause(self, timeout_s: float) -> bool:
        """Take no more requests; False if some are still in flight after timeout_s."""
        return self._engine.pause_queue(self.index, timeout_s)

    def resume(self, memory: MemoryTable) -> None:
        """Go on in another address map; what is not where it was is stopped, to be started again.

        Raises:
            ProtocolError: the ring is not in the memory any more; it is stopped.
        """
        where = None
        try:
            where = self._where(memory)
        finally:
            if where != self._started_at:
                self.halt()
        if self.running and self._enabled is not False:
            self._engine.resume_queue(self.index)

    def halt(self, timeout_s: float = 5.0) -> bool:
        """Stop, keeping what is known; False if requests in flight had to be abandoned after timeout_s."""
        if not self.running:
            return True
        drained = self._engine.stop_queue(self.index, timeout_s)
        self.running = False
        self._base = self._engine.queue_state(self.index)
        self._settled = drained
        self.abandoned |= not drained
        if not drained and self._used_log:
            self._used_log.keep()
        self._used_log = None
        return drained

    def stop(self, timeout_s: float) -> tuple[int, bool]:
        """Stop until the next SET_VRING_KICK; return the base, and whether all requests have ended."""
        drained = self.halt(timeout_s)
        self._drop_kick()
        return self._base, drained

    def signal_error(self) -> None:
        """Tell the front-end that the ring serves no more."""
        if self._error_fd is not None:
            _signal(self._error_fd)

    def reset(self, timeout_s: float) -> bool:
        """Go back to how it was made; False if requests had to be abandoned."""
        _, drained = self.stop(timeout_s)
        self.set_call(None)
        self.set_error(None)
        self._size = self._base = 0
        self._address = self._enabled = self._log_file = None
        return drained

    def close(self, timeout_s: float) -> bool:
        """Stop for good and give the eventfds up; False if requests had to be abandoned."""
        _, drained = self.stop(timeout_s)
        self.set_error(None)
        os.close(self._call_fd)
        self._log_file = None
        return drained

    def _where(self, memory: MemoryTable) -> tuple[int, int, int] | None:
        if self._address is None:
            return None
        parts = (self._address.descriptor, self._address.available, self._address.used)
        descriptor, driver, device = (memory.guest_address(part) for part in parts)
        return descriptor, driver, device

    def _drop_kick(self) -> None:
        if self._kick_fd is not None:
            os.close(self._kick_fd)
            self._kick_fd = None


def check_eventfd(fd: int) -> None:
    """Make an eventfd of somebody else's safe to write to.

    Raises:
        ProtocolError: it is something else.
    """
    if str(Path(f"/proc/self/fd/{fd}").readlink()) != _EVENTFD:
        raise ProtocolError("a descriptor that should be an eventfd is none")
    fcntl.fcntl(fd, fcntl.F_SETFL, fcntl.fcntl(fd, fcntl.F_GETFL) | os.O_NONBLOCK)


def _new_eventfd() -> int:
    return os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)


def _signal(fd: int) -> None:
    with contextlib.suppress(BlockingIOError):
        os.eventfd_write(fd, 1)
