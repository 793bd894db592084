"""From two readings of a node's metrics to what its volumes do in a second. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from prometheus_client.parser import text_string_to_metric_families

_PREFIX = "csi_vduse_volume_"
_SHOWN = ("read", "write")


@dataclass
class Counters:
    """Counters of one volume and operation.

    Args:
        operations: completed.
        bytes: moved by them.
        buckets: cumulative counts of latencies by upper bound in seconds.
    """

    operations: float = 0.0
    bytes: float = 0.0
    buckets: dict[float, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Rate:
    """What a volume does in a second, of one operation.

    Args:
        iops: requests.
        bytes_per_s: bytes.
        median_s: half of the requests took at most this long; None: there was none.
        p99_s: and 99 of 100.
    """

    iops: float
    bytes_per_s: float
    median_s: float | None
    p99_s: float | None


Reading = dict[tuple[str, str], Counters]


def read(text: str) -> Reading:
    """Return the counters of every volume and operation of a node's metrics."""
    found: Reading = {}
    for family in text_string_to_metric_families(text):
        if not family.name.startswith(_PREFIX):
            continue
        for sample in family.samples:
            operation = sample.labels.get("operation")
            if operation not in _SHOWN:
                continue
            counters = found.setdefault((sample.labels["volume_id"], operation), Counters())
            match sample.name.removeprefix(_PREFIX):
                case "operations_total":
                    counters.operations = sample.value
                case "bytes_total":
                    counters.bytes = sample.value
                case "latency_seconds_bucket":
                    counters.buckets[float(sample.labels["le"])] = sample.value
    return found


def rates(before: Reading, after: Reading, seconds: float) -> dict[tuple[str, str], Rate]:
    """Return the rates between two readings; a counter that began anew counts from zero.

    Args:
        before: the earlier reading.
        after: the later one.
        seconds: between them.
    """
    return {key: _rate(before.get(key, Counters()), now, seconds) for key, now in after.items()}


def _rate(before: Counters, now: Counters, seconds: float) -> Rate:
    if now.operations < before.operations:  # the volume was attached anew
        before = Counters()
    buckets = {bound: count - before.buckets.get(bound, 0.0) for bound, count in now.buckets.items()}
    return Rate(
        iops=(now.operations - before.operations) / seconds,
        bytes_per_s=(now.bytes - before.bytes) / seconds,
        median_s=quantile_s(buckets, 0.5),
        p99_s=quantile_s(buckets, 0.99),
    )


def quantile_s(cumulative: Mapping[float, float], part: float) -> float | None:
    """Return the bound that `part` of the requests stayed below, interpolated as Prometheus does.

    Args:
        cumulative: counts by upper bound, the last of them infinity.
        part: such as 0.99.
    """
    total = max(cumulative.values(), default=0.0)
    if total <= 0:
        return None
    lower_bound, lower_count = 0.0, 0.0
    for bound, count in sorted(cumulative.items()):
        if count >= part * total:
            if bound == float("inf") or count == lower_count:
                return lower_bound
            return lower_bound + (bound - lower_bound) * (part * total - lower_count) / (count - lower_count)
        lower_bound, lower_count = bound, count
    return lower_bound
