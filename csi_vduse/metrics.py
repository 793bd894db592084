"""Every metric, declared once, and the endpoint that serves them. docs/metrics.md is the list for users.

Workers count in C, without locks; here their counters are read when Prometheus asks, not before. Names follow
Prometheus' conventions: base units, `_total` for counters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol

from prometheus_client import REGISTRY, Gauge, Histogram, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)

from csi_vduse import __version__, histogram
from csi_vduse.errors import FailedPrecondition, InvalidArgument, VduseError

_MAX_PORT = 65535

RPC_SECONDS = Histogram(
    "csi_vduse_rpc_seconds",
    "CSI calls by method and gRPC code",
    ["method", "code"],
    buckets=(0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100),
)

POOL_TOTAL_BYTES = Gauge("csi_vduse_pool_size_bytes", "What a pool of this node can hold", ["pool"])
POOL_AVAILABLE_BYTES = Gauge(
    "csi_vduse_pool_available_bytes", "What may still be promised in a pool of this node", ["pool"]
)


class Flag:
    """A gauge of 0 or 1 that a process has from when it first sets it.

    All of the driver's processes share this module, and an alert must not take the 0 of one that has nothing to say.
    """

    def __init__(self, name: str, text: str) -> None:
        self._describe = name, text
        self._gauge: Gauge | None = None

    def set(self, on: bool) -> None:  # noqa: FBT001 -- reads as a sentence
        """Say 1 or 0."""
        if self._gauge is None:
            self._gauge = Gauge(*self._describe)
        self._gauge.set(on)


REGISTERED = Flag("csi_vduse_registered", "1 if kubelet has registered the driver on this node")
LEADING = Flag("csi_vduse_leading", "1 if this controller leads")


class Operation(Protocol):
    """Counters of one kind of request; csi_vduse.agent.model.OperationStats."""

    @property
    def operation(self) -> str:
        """Its name."""

    @property
    def count(self) -> int:
        """Completed requests."""

    @property
    def bytes(self) -> int:
        """Moved by them."""

    @property
    def errors(self) -> int:
        """Those that failed."""

    @property
    def latency_sum_s(self) -> float:
        """Time they took together."""

    @property
    def latency(self) -> Sequence[int]:
        """Histogram of the time each took; csi_vduse/histogram.py."""


class Remote(Protocol):
    """Counters of a backend behind a network; csi_vduse.agent.model.RemoteStats."""

    @property
    def state(self) -> str:
        """connected, connecting or refused."""

    @property
    def connected(self) -> int:
        """Connections in use."""

    @property
    def connects(self) -> int:
        """Connections made."""

    @property
    def failures(self) -> int:
        """Attempts that failed."""

    @property
    def losses(self) -> int:
        """Connections lost."""

    @property
    def resent(self) -> int:
        """Commands sent again."""

    @property
    def sends(self) -> int:
        """Sends, of many commands each."""

    @property
    def receives(self) -> int:
        """Receives, of many replies each."""

    @property
    def received_bytes(self) -> int:
        """Payload received."""

    @property
    def copied_bytes(self) -> int:
        """Of that, copied."""

    @property
    def latency_sum_s(self) -> float:
        """Time from sent to answered, of all commands together."""

    @property
    def latency(self) -> Sequence[int]:
        """Histogram of it; csi_vduse/histogram.py."""


class Volume(Protocol):
    """Counters of one worker; csi_vduse.agent.model.VolumeStats."""

    @property
    def volume_id(self) -> str:
        """Whose worker."""

    @property
    def backend(self) -> str:
        """Kind of its backend."""

    @property
    def operations(self) -> Sequence[Operation]:
        """By kind of request."""

    @property
    def in_flight(self) -> int:
        """Requests taken and not completed."""

    @property
    def kicks(self) -> int:
        """Notifications from the driver."""

    @property
    def interrupts(self) -> int:
        """Notifications to the driver."""

    @property
    def batches(self) -> int:
        """Groups of requests taken together."""

    @property
    def malformed(self) -> int:
        """Refused descriptor chains."""

    @property
    def throttled(self) -> int:
        """How often its limits stopped a queue."""

    @property
    def throttled_s(self) -> float:
        """For how long."""

    @property
    def batch_sizes(self) -> Sequence[int]:
        """Batches by size; bucket i: above 2^(i-1), at most 2^i."""

    @property
    def depths(self) -> Sequence[int]:
        """Batches by how many requests were in flight with them; buckets likewise."""

    @property
    def data_max_bytes(self) -> int:
        """Of reads and writes in flight at once, the most there were."""

    @property
    def bounce_bytes(self) -> int:
        """Bounce memory of the device; 0: none."""

    @property
    def waiting(self) -> int:
        """Of the requests in flight, for a backend that is full or away."""

    @property
    def unanswered_s(self) -> float:
        """How long nothing has been answered of what is in flight."""

    @property
    def stalled_s(self) -> float:
        """Sum of such times that were longer than a second, as they end."""

    @property
    def remote(self) -> Remote | None:
        """Of a backend behind a network."""


# Counters of every worker, and how many attachments are in each state, 0 included.
Read = Callable[[], tuple[Iterable[Volume], dict[str, int]]]


class WorkerCollector:
    """Turns the workers' counters into metrics.

    Args:
        read: asks the agent; may raise if it does not answer, then the scrape has no volumes.
    """

    def __init__(self, read: Read) -> None:
        self._read = read

    def describe(self) -> list[Metric]:
        """Say nothing: registration must not ask the agent."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Ask for the counters and yield them."""
        yield InfoMetricFamily("csi_vduse_build", "Version", value={"version": __version__})
        up = GaugeMetricFamily("csi_vduse_agent_up", "1 if the agent gave its counters")
        try:
            volumes, states = self._read()
        except (VduseError, TimeoutError):
            up.add_metric([], 0)
            yield up
            return
        up.add_metric([], 1)
        yield up
        attachments = GaugeMetricFamily(
            "csi_vduse_attachments", "Volumes of this node by state", labels=["state"]
        )
        for state, number in states.items():
            attachments.add_metric([state], number)
        yield attachments
        yield from _volume_metrics(list(volumes))


_GAUGES = {
    "in_flight": ("csi_vduse_volume_requests_in_flight", "Requests taken and not completed"),
    "waiting": ("csi_vduse_volume_requests_waiting", "Of them, for a backend that is full or away"),
    "unanswered_s": (
        "csi_vduse_volume_unanswered_seconds",
        "How long nothing has been answered of what is in flight",
    ),
    "data_max_bytes": ("csi_vduse_volume_data_in_flight_max_bytes", "Of reads and writes, the most at once"),
    "bounce_bytes": ("csi_vduse_volume_bounce_size_bytes", "Bounce memory of the device"),
}
_COUNTERS = {
    "kicks": ("csi_vduse_volume_kicks", "Notifications from the driver"),
    "interrupts": ("csi_vduse_volume_interrupts", "Notifications to the driver"),
    "batches": ("csi_vduse_volume_batches", "Groups of requests taken together"),
    "malformed": ("csi_vduse_volume_malformed_requests", "Descriptor chains refused as malformed"),
    "throttled": ("csi_vduse_volume_throttled", "How often the volume's limits stopped a queue"),
    "throttled_s": ("csi_vduse_volume_throttled_seconds", "For how long, all queues together"),
    "stalled_s": (
        "csi_vduse_volume_stalled_seconds",
        "With requests in flight of which none was answered for over a second",
    ),
}


def _volume_metrics(volumes: Sequence[Volume]) -> Iterator[Metric]:
    labels = ["volume_id", "backend"]
    by_operation = [*labels, "operation"]
    operations = CounterMetricFamily("csi_vduse_volume_operations", "Completed requests", labels=by_operation)
    moved = CounterMetricFamily("csi_vduse_volume_bytes", "Bytes moved by requests", labels=by_operation)
    errors = CounterMetricFamily(
        "csi_vduse_volume_errors", "Requests that ended with an error", labels=by_operation
    )
    latency = HistogramMetricFamily(
        "csi_vduse_volume_latency_seconds", "From taken to completed", labels=by_operation
    )
    batch_sizes = HistogramMetricFamily(
        "csi_vduse_volume_batch_requests", "Requests of a batch", labels=labels
    )
    depths = HistogramMetricFamily(
        "csi_vduse_volume_queue_depth", "Requests in flight on a queue, at each batch", labels=labels
    )
    counters, gauges = (
        {name: kind(*texts, labels=labels) for name, texts in of_kind.items()}
        for kind, of_kind in ((CounterMetricFamily, _COUNTERS), (GaugeMetricFamily, _GAUGES))
    )
    for volume in volumes:
        values = [volume.volume_id, volume.backend]
        for name, family in (*counters.items(), *gauges.items()):
            family.add_metric(values, getattr(volume, name))
        for counted, distribution in ((volume.batch_sizes, batch_sizes), (volume.depths, depths)):
            distribution.add_metric(values, histogram.exported_counts(counted), sum_value=None)
        for operation in volume.operations:
            named = [*values, operation.operation]
            operations.add_metric(named, operation.count)
            moved.add_metric(named, operation.bytes)
            errors.add_metric(named, operation.errors)
            latency.add_metric(named, histogram.exported(operation.latency), operation.latency_sum_s)
    yield from (operations, moved, errors, latency, batch_sizes, depths)
    yield from (*counters.values(), *gauges.values())
    yield from _remote_metrics(volumes, labels)


_REMOTE_COUNTERS = {
    "connects": ("csi_vduse_remote_connects", "Connections to the server that were made"),
    "failures": ("csi_vduse_remote_connect_failures", "Attempts to connect that failed"),
    "losses": ("csi_vduse_remote_losses", "Connections that were lost"),
    "resent": ("csi_vduse_remote_resent", "Commands sent again after a loss"),
    "sends": ("csi_vduse_remote_sends", "Sends, of many commands each"),
    "receives": ("csi_vduse_remote_receives", "Receives, of many replies each"),
    "received_bytes": ("csi_vduse_remote_received_bytes", "Payload received"),
    "copied_bytes": ("csi_vduse_remote_copied_bytes", "Of the payload, what was copied to its place"),
}
_REMOTE_STATES = ("connected", "connecting", "refused")


def _remote_metrics(volumes: Sequence[Volume], labels: Sequence[str]) -> Iterator[Metric]:
    states = GaugeMetricFamily(
        "csi_vduse_remote_state", "1 for the state that the server is in", labels=[*labels, "state"]
    )
    connected = GaugeMetricFamily("csi_vduse_remote_connections", "Connections in use", labels=labels)
    latency = HistogramMetricFamily(
        "csi_vduse_remote_latency_seconds", "From sent to the server to answered by it", labels=labels
    )
    counters = {
        name: CounterMetricFamily(metric, text, labels=labels)
        for name, (metric, text) in _REMOTE_COUNTERS.items()
    }
    for volume in volumes:
        remote, values = volume.remote, [volume.volume_id, volume.backend]
        if remote is None:
            continue
        for state in _REMOTE_STATES:
            states.add_metric([*values, state], remote.state == state)
        connected.add_metric(values, remote.connected)
        latency.add_metric(values, histogram.exported(remote.latency), remote.latency_sum_s)
        for name, family in counters.items():
            family.add_metric(values, getattr(remote, name))
    yield from (states, connected, latency, *counters.values())


def observe_pool(pool: str, *, total_bytes: int, available_bytes: int) -> None:
    """Tell how large a pool is and what is left of it."""
    POOL_TOTAL_BYTES.labels(pool).set(total_bytes)
    POOL_AVAILABLE_BYTES.labels(pool).set(available_bytes)


def observe_rpc(method: str, code: str, seconds: float) -> None:
    """Count an ended CSI call."""
    RPC_SECONDS.labels(method, code).observe(seconds)


@contextmanager
def collecting(read: Read) -> Iterator[None]:
    """Have the workers' counters among the metrics while the body runs.

    Args:
        read: see WorkerCollector.
    """
    collector = WorkerCollector(read)
    REGISTRY.register(collector)
    try:
        yield
    finally:
        REGISTRY.unregister(collector)


def serve(address: str, read: Read) -> Callable[[], None]:
    """Serve all metrics over HTTP at HOST:PORT, in a thread; returns what stops it.

    Raises:
        InvalidArgument: not HOST:PORT.
        FailedPrecondition: the address cannot be bound.
    """
    host, port = parse_address(address)
    collector = WorkerCollector(read)
    REGISTRY.register(collector)
    try:
        server, thread = start_http_server(port, addr=host)
    except OSError as error:
        REGISTRY.unregister(collector)
        raise FailedPrecondition(f"metrics cannot be served at {address}: {error.strerror}") from error

    def stop() -> None:
        server.shutdown()
        server.server_close()
        thread.join()
        REGISTRY.unregister(collector)

    return stop


def parse_address(text: str) -> tuple[str, int]:
    """Return host and port of HOST:PORT or [HOST]:PORT.

    Raises:
        InvalidArgument: it is neither.
    """
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or not 0 < int(port) <= _MAX_PORT:
        raise InvalidArgument(f"{text!r} is not HOST:PORT", hint="for example 127.0.0.1:9180")
    return host.strip("[]"), int(port)
