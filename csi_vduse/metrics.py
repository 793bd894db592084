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
REGISTERED = Gauge("csi_vduse_registered", "1 if kubelet has registered the driver on this node")
LEADING = Gauge("csi_vduse_leading", "1 if this controller leads")


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


# Counters of every worker, and how many attachments are in each state.
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
    in_flight = GaugeMetricFamily(
        "csi_vduse_volume_requests_in_flight", "Requests taken and not completed", labels=labels
    )
    batch_sizes = HistogramMetricFamily(
        "csi_vduse_volume_batch_requests", "Requests of a batch", labels=labels
    )
    depths = HistogramMetricFamily(
        "csi_vduse_volume_queue_depth", "Requests in flight on a queue, at each batch", labels=labels
    )
    gauges = {
        "data_max_bytes": GaugeMetricFamily(
            "csi_vduse_volume_data_in_flight_max_bytes",
            "Of reads and writes, the most at once",
            labels=labels,
        ),
        "bounce_bytes": GaugeMetricFamily(
            "csi_vduse_volume_bounce_size_bytes", "Bounce memory of the device", labels=labels
        ),
    }
    counters = {
        "kicks": CounterMetricFamily(
            "csi_vduse_volume_kicks", "Notifications from the driver", labels=labels
        ),
        "interrupts": CounterMetricFamily(
            "csi_vduse_volume_interrupts", "Notifications to the driver", labels=labels
        ),
        "batches": CounterMetricFamily(
            "csi_vduse_volume_batches", "Groups of requests taken together", labels=labels
        ),
        "malformed": CounterMetricFamily(
            "csi_vduse_volume_malformed_requests", "Descriptor chains refused as malformed", labels=labels
        ),
        "throttled": CounterMetricFamily(
            "csi_vduse_volume_throttled", "How often the volume's limits stopped a queue", labels=labels
        ),
        "throttled_s": CounterMetricFamily(
            "csi_vduse_volume_throttled_seconds", "For how long, all queues together", labels=labels
        ),
    }
    for volume in volumes:
        values = [volume.volume_id, volume.backend]
        in_flight.add_metric(values, volume.in_flight)
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
    yield from (operations, moved, errors, latency, in_flight, batch_sizes, depths)
    yield from (*counters.values(), *gauges.values())


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
