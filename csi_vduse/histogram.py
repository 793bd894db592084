"""Histograms that the engine counts, read: quantiles for people, coarse buckets for Prometheus. Pure.

The layout is that of dataplane/src/histogram.h: units of 1/8 µs; eight buckets of one unit, then eight for each
power of two. A bucket is at most 1/8 as wide as what it counts, so its middle is at most 1/16 off. Counts
come as lists that may end early: what is missing is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

LATENCY_BUCKETS: Final = 217
_COUNT_BUCKETS: Final = 11
_SUB_BUCKETS: Final = 8
_UNIT_S: Final = 1e-6 / _SUB_BUCKETS
# What Prometheus gets: a series for each of these, so few. Every power of two where disks and networks are,
# every other one where only trouble is.
_EXPORTED_EXPONENTS: Final = (*range(3, 21), 22, 24, 26)
EXPORTED_BOUNDS_S: Final = tuple(2**exponent * 1e-6 for exponent in _EXPORTED_EXPONENTS)


def lower_bound_s(bucket: int) -> float:
    """Return the least latency that a bucket counts."""
    if bucket < _SUB_BUCKETS:
        return bucket * _UNIT_S
    doublings, sub_bucket = divmod(bucket - _SUB_BUCKETS, _SUB_BUCKETS)
    return float((_SUB_BUCKETS + sub_bucket) << doublings) * _UNIT_S


def quantile_s(counts: Sequence[int], fraction: float, *, max_s: float) -> float:
    """Return a latency that the given fraction of all stayed below, within a sixteenth; 0 without any.

    Args:
        counts: one for each bucket.
        fraction: 0 to 1.
        max_s: the longest latency, which no quantile exceeds.
    """
    wanted, seen = fraction * sum(counts), 0
    for bucket, count in enumerate(counts):
        seen += count
        if count and seen >= wanted:
            if bucket >= LATENCY_BUCKETS - 1:
                return max_s
            return min((lower_bound_s(bucket) + lower_bound_s(bucket + 1)) / 2, max_s)
    return 0.0


def exported(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return Prometheus' cumulative buckets of latencies in seconds."""
    cumulative = []
    for bound_s, exponent in zip(EXPORTED_BOUNDS_S, _EXPORTED_EXPONENTS, strict=True):
        end = _SUB_BUCKETS * (exponent + 1)
        cumulative.append((repr(bound_s), float(sum(counts[:end]))))
    return [*cumulative, ("+Inf", float(sum(counts)))]


def exported_counts(counts: Sequence[int]) -> list[tuple[str, float]]:
    """Return Prometheus' cumulative buckets of numbers: bucket i counts those up to 2^i."""
    cumulative = [(repr(float(2**i)), float(sum(counts[: i + 1]))) for i in range(_COUNT_BUCKETS)]
    return [*cumulative, ("+Inf", float(sum(counts)))]
