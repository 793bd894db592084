"""The C engine as a Python object: return codes become errors, structs become values.

Theory of operation, threads and invariants: src/engine.c and src/queue.c. Calls release the GIL.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

from csi_vduse.dataplane import nbd_config
from csi_vduse.dataplane._engine import ffi, lib
from csi_vduse.dataplane.backend_spec import (
    ErrorBackend,
    FileBackend,
    NbdBackend,
    NullBackend,
    ServedBackend,
    VhostUserBackend,
)
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
    VduseError,
)

OPERATIONS: Final = ("read", "write", "flush", "discard", "write_zeroes", "get_id", "unsupported")
FAULTS: Final = (
    "none",
    "ring-address",
    "avail-index",
    "head",
    "chain",
    "memory",
    "io_uring",
    "in-flight-log",
)
BACKEND_STATES: Final = ("local", "connected", "connecting", "refused")


@dataclass(frozen=True)
class Region:
    """One range of the driver's addresses and the file that backs it; the fd is only used during the call."""

    iova: int
    size_bytes: int
    offset_bytes: int
    fd: int
    writable: bool


@dataclass(frozen=True)
class QueueAddress:
    """Where a queue is, and how to speak to its driver; state as in decl/engine.h, ``struct vd_queue_config``.

    inflight: shared memory of ``inflight_bytes``, which stays mapped until the queue has stopped in time.
    paused: it takes nothing from the driver until it is resumed.
    """

    features: int
    size: int
    desc_iova: int
    driver_iova: int
    device_iova: int
    state: int
    resume: bool
    kick_fd: int
    notify_fd: int
    notify_ioctl: int
    inflight: mmap.mmap | memoryview | None = None
    paused: bool = False


# For how long a backend that is full (ENOSPC) or fails (EIO) is taken for one that may come back.
AWAY_S: Final = 30.0


@dataclass(frozen=True)
class BackendStatus:
    """How a backend's connections are: a name of BACKEND_STATES and why, connections made, attempts that failed."""

    state: str
    reason: str
    connects: int
    failures: int


@dataclass(frozen=True)
class Failure:
    """The newest request that failed or has to wait: how many of each there were so far, and what happened to it."""

    count: int
    waits: int
    operation: str
    offset_bytes: int
    error: str


def inflight_bytes(queue_size: int, *, packed: bool) -> int:
    """Return how large a queue's in-flight log is, a multiple of 64."""
    return int(lib.vd_inflight_bytes(queue_size, packed))


def init_inflight(log: mmap.mmap, queue_size: int, *, packed: bool) -> None:
    """Make an empty in-flight log of a queue that the driver has just reset, or never used.

    Raises:
        VduseError: it is too small.
    """
    buffer = ffi.from_buffer(log)
    _check(lib.vd_inflight_init(buffer, len(buffer), queue_size, packed), "making an in-flight log")


def uring_problem() -> str:
    """Say why this process, and so its workers, may not have an io_uring, and what to do; empty if they may."""
    result = int(lib.vd_uring_works())
    if not result:
        return ""
    cause = (
        "set the sysctl kernel.io_uring_disabled to 0, and allow io_uring in the container's seccomp profile"
    )
    return f"io_uring cannot be used ({os.strerror(-result)}): {cause if result == -errno.EPERM else 'see dmesg'}"


def is_kernels_own(fd: int) -> bool:
    """Whether a file has no place in any file system (anon_inode): not a VM's memory, which is somebody's file."""
    return bool(lib.vd_is_anonymous(fd))


class Engine:
    """One device's backend, address map and queues.

    Args:
        backend: where the bytes are.
        capacity_bytes: what the driver may address; 0: not known before the backend is open (set_capacity).
        block_size_bytes: the smallest unit that the driver was told.
        max_queues: queues that may be started.
        read_only: refuse whatever writes.
        serial: answer to GET_ID, cut to 20 bytes.
        event_fd: eventfd that is written when a queue faults, a request fails or the backend's state changes.
        queue_size: of each queue, at most; for a vhost-user server.
        resume: the device exists already and must be served: a server that is away is waited for.
        broker_fd: of a socket to who makes connections for us (broker.py); None: we make our own.

    Raises:
        NotFound, PermissionDenied: the image or export cannot be opened.
        InvalidArgument: the image is neither a file nor a block device.
        FailedPrecondition: the image or export is smaller than the capacity, or read-only; io_uring is not allowed.
        Unavailable: another worker holds the image; the server does not answer.
    """

    fences: Final = True  # what is abandoned cannot reach the driver's memory any more

    def __init__(
        self,
        *,
        backend: ServedBackend,
        capacity_bytes: int,
        block_size_bytes: int,
        max_queues: int,
        read_only: bool,
        serial: str,
        event_fd: int,
        queue_size: int = 0,
        resume: bool = False,
        broker_fd: int | None = None,
    ) -> None:
        if (problem := uring_problem()) and not isinstance(backend, ErrorBackend):
            raise FailedPrecondition(problem)
        self._max_queues = max_queues
        keep: list[Any] = []  # what the config points to
        nbd = ffi.NULL
        match backend:
            case FileBackend(path):
                name, place = "file", os.fsencode(path)
            case NbdBackend():
                name, place = "nbd", backend.uri.encode()
                nbd = nbd_config.encode(backend, keep, wait=resume, broker_fd=broker_fd)
            case VhostUserBackend(socket):
                name, place = "vhost-user", os.fsencode(socket)
            case NullBackend():
                name, place = "null", b""
            case ErrorBackend():
                name, place = "error", b""
        strings = [ffi.new("char[]", text) for text in (serial.encode(), name.encode(), place)]
        reason = ffi.new("char[]", nbd_config.REASON_BYTES)
        config = ffi.new(
            "struct vd_config *",
            {
                "nbd": nbd,
                "reason": reason,
                "max_queues": max_queues,
                "queue_size": queue_size,
                "block_size_bytes": block_size_bytes,
                "capacity_bytes": capacity_bytes,
                "read_only": read_only,
                "event_fd": event_fd,
                "serial": strings[0],
                "backend": strings[1],
                "path": strings[2],
                "away_ms": round(AWAY_S * 1000),
            },
        )
        engine = ffi.new("struct vd_engine **")
        result = lib.vd_engine_new(config, engine)
        if result < 0 and name == "nbd":
            raise nbd_config.error(-result, os.fsdecode(place), nbd_config.text(reason))
        if result < 0:
            raise _open_error(-result, os.fsdecode(place), capacity_bytes)
        self._engine = engine[0]

    def close(self) -> None:
        """Let go of backend and memory; all queues must have stopped."""
        lib.vd_engine_free(self._engine)
        self._engine = ffi.NULL

    @property
    def backend_capacity_bytes(self) -> int:
        """What the backend holds now; 0 if it has no size of its own."""
        info = ffi.new("struct vd_backend_info *")
        lib.vd_engine_backend_info(self._engine, info)
        return int(info.capacity_bytes)

    @property
    def backend_said_bytes(self) -> int:
        """What the backend says that it holds, with an end that is no whole block of its own; 0 if it says nothing."""
        info = ffi.new("struct vd_backend_info *")
        lib.vd_engine_backend_info(self._engine, info)
        return int(info.said_bytes)

    def at_once(self) -> contextlib.AbstractContextManager[None]:
        """Nothing: each queue is served by itself. A server takes several calls as one (vhost_user/relay.py)."""
        return contextlib.nullcontext()

    def set_regions(self, regions: Sequence[Region]) -> None:
        """Replace the address map; queues must be stopped or paused."""
        array = ffi.new("struct vd_region[]", len(regions))
        for item, region in zip(array, regions, strict=True):
            item.iova = region.iova
            item.size = region.size_bytes
            item.offset = region.offset_bytes
            item.fd = region.fd
            item.writable = region.writable
        _check(lib.vd_engine_set_regions(self._engine, array, len(regions)), "mapping the driver's memory")

    def set_capacity(self, capacity_bytes: int) -> None:
        """Change what the driver may address.

        Raises:
            FailedPrecondition: the backend is smaller.
            Unavailable: the server did not say what size it has.
        """
        result = lib.vd_engine_set_capacity(self._engine, capacity_bytes)
        if result < 0 and result != -errno.EINVAL:
            raise Unavailable(f"the server did not say its size: {os.strerror(-result)}", hint="retry")
        if result < 0:
            raise FailedPrecondition(
                f"capacity {capacity_bytes} is not whole sectors within the backend's "
                f"{self.backend_capacity_bytes} bytes",
                hint="grow the backend first",
            )

    def set_throttle(self, throttle: Throttle) -> None:
        """Change the limits; at any time."""
        limits = {
            "requests_per_s": throttle.iops,
            "bytes_per_s": throttle.bytes_per_s,
            "burst_ms": round(throttle.burst_s * 1000),
        }
        lib.vd_engine_set_limits(self._engine, ffi.new("struct vd_limits *", limits))

    def start_queue(self, index: int, address: QueueAddress) -> None:
        """Start serving a queue on a thread of its own."""
        config = ffi.new(
            "struct vd_queue_config *",
            {
                "features": address.features,
                "size": address.size,
                "desc_iova": address.desc_iova,
                "driver_iova": address.driver_iova,
                "device_iova": address.device_iova,
                "state": address.state,
                "resume": address.resume,
                "paused": address.paused,
                "kick_fd": address.kick_fd,
                "notify_fd": address.notify_fd,
                "notify_ioctl": address.notify_ioctl,
            },
        )
        if address.inflight is not None:
            log = ffi.from_buffer(address.inflight)
            config.inflight = log
            config.inflight_bytes = len(log)
        _check(lib.vd_queue_start(self._engine, index, config), f"starting queue {index}")

    def stop_queue(self, index: int, timeout_s: float) -> bool:
        """Stop a queue; False if its requests in flight had to be abandoned after timeout_s."""
        return bool(lib.vd_queue_stop(self._engine, index, int(timeout_s * 1000)) == 0)

    def pause_queue(self, index: int, timeout_s: float) -> bool:
        """Stop fetching; False if requests are still in flight after timeout_s."""
        return bool(lib.vd_queue_pause(self._engine, index, int(timeout_s * 1000)) == 0)

    def resume_queue(self, index: int) -> None:
        """Fetch again, with the address map of now."""
        lib.vd_queue_resume(self._engine, index)

    def server_region(self) -> Region:
        """Return the memory of the rings for a vhost-user server; the descriptor stays the engine's."""
        region = ffi.new("struct vd_region *")
        lib.vd_vhost_memory(self._engine, region)
        return Region(int(region.iova), int(region.size), 0, int(region.fd), writable=True)

    def server_ring(self, index: int) -> tuple[QueueAddress, int]:
        """Return where a queue's ring for the server is, and its call eventfd; descriptors stay the engine's."""
        ring = ffi.new("struct vd_vhost_ring *")
        _check(lib.vd_vhost_ring(self._engine, index, ring), f"finding the server's ring of queue {index}")
        address = QueueAddress(
            features=0,
            size=int(ring.size),
            desc_iova=int(ring.desc_iova),
            driver_iova=int(ring.driver_iova),
            device_iova=int(ring.device_iova),
            state=0,
            resume=False,
            kick_fd=int(ring.kick_fd),
            notify_fd=-1,
            notify_ioctl=0,
        )
        return address, int(ring.call_fd)

    def serve_by(self, index: int, server: int) -> None:
        """Tell a queue which server works on its ring from now on; 0: none any more."""
        lib.vd_vhost_serve(self._engine, index, server)

    def server_of(self, index: int) -> int:
        """Return which server a queue has its ring with; it follows serve_by."""
        return int(lib.vd_vhost_serves(self._engine, index))

    def server_lies(self, index: int) -> bool:
        """Whether a server answered what it was not asked."""
        return bool(lib.vd_vhost_lies(self._engine, index))

    def queue_state(self, index: int) -> int:
        """Return how far a queue is, as in ``QueueAddress``."""
        state = ffi.new("uint32_t *")
        lib.vd_queue_state(self._engine, index, state)
        return int(state[0])

    def waiting(self) -> int:
        """Return how many requests wait for a backend that is full or away; a server that is away has all of them."""
        remote = self.backend_status() is not None
        return sum(q.in_flight if remote and not q.remote.connected else q.waiting for q in self._stats())

    def abandoned_queues(self) -> int:
        """Return how many queues were stopped without waiting and have not ended yet; until then none fetches."""
        return int(lib.vd_engine_abandoned(self._engine))

    def faults(self) -> dict[int, str]:
        """Return the queues that wait for a reset, and why."""
        return {i: FAULTS[s.fault] for i, s in enumerate(self._stats()) if s.fault}

    def failure(self) -> Failure | None:
        """Return the newest request that failed or has to wait for its backend, if there ever was one."""
        failure = ffi.new("struct vd_failure *")
        lib.vd_engine_failure(self._engine, failure)
        if not failure.count and not failure.waits:
            return None
        return Failure(
            int(failure.count),
            int(failure.waits),
            OPERATIONS[failure.operation],
            int(failure.offset_bytes),
            errno.errorcode.get(failure.error, str(failure.error)),
        )

    def stats(self) -> dict[str, Any]:
        """Sum the counters of all queues, in the shape of VolumeStats in agent.proto."""
        queues = self._stats()
        operations = []
        for number, name in enumerate(OPERATIONS):
            of_queues = [q.operations[number] for q in queues]
            operations.append(
                {
                    "operation": name,
                    "count": sum(o.count for o in of_queues),
                    "bytes": sum(o.bytes for o in of_queues),
                    "errors": sum(o.errors for o in of_queues),
                    "latency_sum_s": sum(o.latency_ns for o in of_queues) / 1e9,
                    "latency_max_s": max(o.latency_max_ns for o in of_queues) / 1e9,
                    "latency": _merged([o.latency for o in of_queues]),
                }
            )
        sums = {name: sum(getattr(q, name) for q in queues) for name in _SUMMED}
        merged = {name: _merged([getattr(q, name) for q in queues]) for name in ("batch_sizes", "depths")}
        times = {f"{name}_s": sum(getattr(q, f"{name}_ns") for q in queues) / 1e9 for name in _SUMMED_TIMES}
        stall = {"requests_waiting": self.waiting(), "unanswered_s": _unanswered_s(queues)}
        counted = {"operations": operations, **sums, **merged, **times, **stall}
        status = self.backend_status()
        return counted | ({"remote": _remote(queues) | asdict(status)} if status else {})

    def backend_status(self) -> BackendStatus | None:
        """Return how the backend's connections are; None for one that has none."""
        info = ffi.new("struct vd_backend_info *")
        lib.vd_engine_backend_info(self._engine, info)
        if not info.status.state:
            return None
        status = info.status
        state, reason = BACKEND_STATES[status.state], nbd_config.text(status.reason)
        return BackendStatus(state, reason, int(status.connects), int(status.failures))

    def _stats(self) -> list[Any]:
        queues = [ffi.new("struct vd_queue_stats *") for _ in range(self._max_queues)]
        for index, queue in enumerate(queues):
            lib.vd_queue_stats_read(self._engine, index, queue)
        return queues


# The sum of the queues' maxima of data_max_bytes is at least the maximum of the whole device.
_SUMMED: Final = ("in_flight", "kicks", "interrupts", "batches", "malformed", "throttled", "data_max_bytes")
_SUMMED_TIMES: Final = ("throttled", "stalled")


_REMOTE_SUMMED: Final = (
    "commands",
    "sends",
    "receives",
    "received_bytes",
    "copied_bytes",
    "resent",
    "losses",
    "connected",
)


def _unanswered_s(queues: Sequence[Any]) -> float:
    now = time.monotonic_ns()
    return max((now - (q.unanswered_since_ns or now)) / 1e9 for q in queues)


def _remote(queues: Sequence[Any]) -> dict[str, Any]:
    of_queues = [queue.remote for queue in queues]
    sums = {name: int(sum(getattr(r, name) for r in of_queues)) for name in _REMOTE_SUMMED}
    return sums | {
        "latency_sum_s": sum(r.latency_ns for r in of_queues) / 1e9,
        "latency_max_s": max(r.latency_max_ns for r in of_queues) / 1e9,
        "latency": _merged([r.latency for r in of_queues]),
    }


def _merged(histograms: Sequence[Any]) -> list[int]:
    """Add histograms up; zeros at the end are left out: most latencies are short."""
    sums = [sum(buckets) for buckets in zip(*(ffi.unpack(h, len(h)) for h in histograms), strict=True)]
    while sums and not sums[-1]:
        sums.pop()
    return sums


def _check(result: int, what: str) -> None:
    if result < 0:
        raise VduseError(f"{what} failed: {os.strerror(-result)}")


def _open_error(number: int, path: str, capacity_bytes: int) -> VduseError:
    short = FailedPrecondition(
        f"image {path} is smaller than the {capacity_bytes} bytes of the volume",
        hint="it was cut short; restore it before data beyond its end is needed",
    )
    busy = Unavailable(
        f"block device {path} is in use",
        hint="it is mounted, part of another device, or served by another worker; see lsblk and its holders",
    )
    locked = Unavailable(
        f"image {path} is in use by another worker", hint="an image has one writer at a time"
    )
    missing = NotFound(f"image {path} does not exist")
    closed = PermissionDenied(f"image {path} cannot be opened: {os.strerror(number)}")
    known = {
        errno.ENOENT: missing,
        errno.ENOTDIR: missing,
        errno.EACCES: closed,
        errno.EPERM: closed,
        errno.EROFS: closed,
        errno.EISDIR: InvalidArgument(f"{path} is neither a regular file nor a block device"),
        errno.ENOSPC: short,
        errno.EBUSY: busy,
        errno.EAGAIN: locked,
    }
    return known.get(number, VduseError(f"opening the backend {path!r} failed: {os.strerror(number)}"))
