"""Latency histograms: engine and reader agree where a latency is counted, and quantiles are near the truth."""

from __future__ import annotations

import random

import pytest

from csi_vduse import histogram
from csi_vduse.dataplane._engine import lib

MINUTE_NS = 60 * 10**9


def counted(latencies_ns: list[int]) -> list[int]:
    counts = [0] * histogram.LATENCY_BUCKETS
    for latency_ns in latencies_ns:
        counts[lib.vd_latency_bucket_of(latency_ns)] += 1
    return counts


def test_engine_and_reader_agree_on_every_bucket():
    assert histogram.LATENCY_BUCKETS == lib.VD_LATENCY_BUCKETS
    assert len(histogram.exported_counts([])) == lib.VD_COUNT_BUCKETS + 1
    for bucket in range(histogram.LATENCY_BUCKETS):
        first_ns = round(histogram.lower_bound_s(bucket) * 1e9)
        assert lib.vd_latency_bucket_of(first_ns) == bucket
        if bucket:
            assert lib.vd_latency_bucket_of(first_ns - 1) == bucket - 1


def test_no_latency_is_too_long_to_count():
    assert lib.vd_latency_bucket_of(2**64 - 1) == histogram.LATENCY_BUCKETS - 1


def test_any_latency_from_a_microsecond_to_a_minute_is_told_within_a_sixteenth():
    random.seed(4)
    for _ in range(2000):
        latency_ns = round(1000 * (MINUTE_NS / 1000) ** random.random())
        told_s = histogram.quantile_s(counted([latency_ns]), 0.5, max_s=100)
        assert told_s == pytest.approx(latency_ns / 1e9, rel=1 / 16)


def test_quantiles_of_many_are_near_the_sorted_ones():
    random.seed(5)
    latencies_ns = sorted(round(random.lognormvariate(11, 1.5)) for _ in range(20000))
    counts, max_s = counted(latencies_ns), latencies_ns[-1] / 1e9
    for fraction in (0.5, 0.99, 0.999):
        truth_s = latencies_ns[int(fraction * len(latencies_ns)) - 1] / 1e9
        assert histogram.quantile_s(counts, fraction, max_s=max_s) == pytest.approx(truth_s, rel=1 / 16)
    assert histogram.quantile_s(counts, 1, max_s=max_s) <= max_s


def test_what_is_longer_than_the_buckets_is_told_by_the_maximum():
    assert histogram.quantile_s(counted([3 * MINUTE_NS]), 0.99, max_s=180) == 180


def test_without_latencies_there_is_no_quantile():
    assert histogram.quantile_s([], 0.5, max_s=0) == 0


def test_exported_buckets_are_few_cumulative_and_lose_nothing():
    latencies_ns = [100, 7_999, 8_000, 1_000_000, MINUTE_NS, 2 * MINUTE_NS]
    exported = histogram.exported(counted(latencies_ns))
    assert len(exported) <= 24
    assert exported[0] == ("8e-06", 2)
    assert dict(exported)["0.001024"] == 4
    assert exported[-1] == ("+Inf", 6)
    assert [count for _, count in exported] == sorted(count for _, count in exported)


def test_counts_that_end_early_are_read():
    assert histogram.exported([0] * 31 + [5])[0] == ("8e-06", 5)
    exported = histogram.exported_counts([1, 0, 2])
    assert exported[:4] == [("1.0", 1), ("2.0", 1), ("4.0", 3), ("8.0", 3)]
    assert exported[-1] == ("+Inf", 3)
