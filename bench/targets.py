"""The targets, and what was measured of each: one line each, those that are lost among them.

Ratios are of medians within one part's results; a row that compares several jobs takes the worst. A row whose
figures are not there says "not measured".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from bench.results import FIO_NBD, KERNEL_NBD, OURS, QSD, Run, median, runs_of

_NBD = f"{KERNEL_NBD} 1"
Figures = dict[str, dict[str, Any] | None]
Pick = Callable[[Run], float | None]

_READ_WRITE_32 = ("4k randread QD32", "4k randwrite QD32")
_QD1 = ("4k randread QD1", "4k randwrite QD1")
_LARGE = ("128k read QD8", "128k write QD8")
_NATIVE_32 = ("4k read QD32", "4k write QD32")


@dataclass(frozen=True)
class Target:
    """A line of the issue's table; `more` tells whether more is better."""

    text: str
    at_least: float
    beyond: float
    more: bool
    unit: str
    measure: Callable[[Figures], float | None]

    def verdict(self, measured: float | None) -> str:
        """Whether that is good enough, in words."""
        if measured is None:
            return "not measured"
        for bound, word in ((self.beyond, "met, and beyond"), (self.at_least, "met")):
            if (measured >= bound) if self.more else (measured <= bound):
                return word
        return "**lost**"


def _iops(run: Run) -> float:
    return run.iops


def _mean(run: Run) -> float:
    return run.mean_us


def _server_cpu(run: Run) -> float | None:
    return run.server_cpu_us


def _client_cpu(run: Run) -> float | None:
    """Of the machine, without the NBD server's processes if they run there."""
    return run.cpu_us - (run.server_cpu_us or 0)


def _value(runs: Iterable[Run], server: str, kind: str, job: str, pick: Pick) -> float | None:
    """The median of one server; of a family of servers (`server` and a variant behind it) the one with most IOPS."""
    names = {run.server for run in runs if run.server == server or run.server.startswith(f"{server} ")}
    best: tuple[float, float | None] | None = None
    for name in names:
        mine = [r for r in runs if (r.server, r.kind, r.job, r.queues) == (name, kind, job, 1)]
        rate = median(mine, _iops)
        if rate is not None and (best is None or rate > best[0]):
            best = (rate, median(mine, pick))
    return best[1] if best else None


def ratio(
    part: str,
    kind: str,
    jobs: Iterable[str],
    peer: str,
    *,
    pick: Pick = _iops,
    peer_kind: str = "",
    more: bool = True,
) -> Callable[[Figures], float | None]:
    """Ours divided by a peer's; the worst of the jobs."""

    def measure(figures: Figures) -> float | None:
        runs = runs_of(figures.get(part))
        found = []
        for job in jobs:
            mine = _value(runs, OURS, kind, job, pick)
            theirs = _value(runs, peer, peer_kind or kind, job, pick)
            if mine is None or not theirs:
                return None
            found.append(mine / theirs)
        return min(found) if more else max(found)

    return measure


def _scale(name: str) -> Callable[[Figures], float | None]:
    def measure(figures: Figures) -> float | None:
        rows = (figures.get("scale") or {}).get("rows") or []
        return float(rows[-1][name]) if rows and rows[-1].get(name) is not None else None

    return measure


def _first_io(figures: Figures) -> float | None:
    value = (figures.get("native") or {}).get("worker_start_ms")
    engine = (figures.get("instructions") or {}).get("engine_to_first_request_us")
    return None if value is None or engine is None else float(value) + float(engine) / 1e3


_TIMES = "\u00d7"


def _more(text: str, at_least: float, beyond: float, measure: Callable[[Figures], float | None]) -> Target:
    """A ratio that ought to be large."""
    return Target(text, at_least, beyond, more=True, unit=_TIMES, measure=measure)


def _less(
    text: str, at_most: float, beyond: float, measure: Callable[[Figures], float | None], unit: str = _TIMES
) -> Target:
    """A ratio or a quantity that ought to be small."""
    return Target(text, at_most, beyond, more=False, unit=unit, measure=measure)


def _p99(run: Run) -> float | None:
    return run.p99_us


# At least, and beyond that: those of latency at a depth of 1, IOPS at 32 (reads, writes) and of large requests.
_OVER_A_NETWORK = ((1.3, 1.1), (1.9, 2.2), (1.3, 1.6), (1.3, 1.6))
_ON_LOOPBACK = ((1.5, 1.2), (1.5, 1.8), (1.5, 1.8), (1, 1.3))
_Bounds = tuple[tuple[float, float], ...]


def _remote(part: str, where: str, bounds: _Bounds) -> tuple[Target, ...]:
    """What a disk on an NBD server is to the kernel's client."""
    latency, reads, writes, large = bounds
    return (
        _more(
            f"VM, {where}, 4k QD32 randread, IOPS / kernel nbd's",
            *reads,
            ratio(part, "remote", ["4k randread QD32"], _NBD),
        ),
        _more(
            f"VM, {where}, 4k QD32 randwrite, IOPS / kernel nbd's",
            *writes,
            ratio(part, "remote", ["4k randwrite QD32"], _NBD),
        ),
        _more(
            f"VM, {where}, 4k QD8 randread, IOPS / kernel nbd's",
            1.2,
            1.5,
            ratio(part, "remote", ["4k randread QD8"], _NBD),
        ),
        _more(
            f"VM, {where}, 4k QD8 randwrite, IOPS / kernel nbd's",
            1.4,
            1.5,
            ratio(part, "remote", ["4k randwrite QD8"], _NBD),
        ),
        _less(
            f"VM, {where}, 4k QD1, mean latency / kernel nbd's",
            *latency,
            ratio(part, "remote", _QD1, _NBD, pick=_mean, more=False),
        ),
        _less(
            f"VM, {where}, 4k QD1, CPU of the client side per request / kernel nbd's",
            1.5,
            1.2,
            ratio(part, "remote", _QD1, _NBD, pick=_client_cpu, more=False),
        ),
        _less(
            f"VM, {where}, 4k mixed at 60 % of the slower one's most, p99 / kernel nbd's",
            1.0,
            0.7,
            ratio(part, "remote", ["4k randrw at 60%"], _NBD, pick=_p99, more=False),
        ),
        _more(
            f"VM, {where}, 128k sequential, IOPS / kernel nbd's",
            *large,
            ratio(part, "remote", _LARGE, _NBD),
        ),
        _less(
            f"VM, {where}, 4k QD32, CPU of the client side per request / kernel nbd's",
            0.8,
            0.6,
            ratio(part, "remote", _READ_WRITE_32, _NBD, pick=_client_cpu, more=False),
        ),
        _more(
            f"VM, {where}, 4k QD32, IOPS / fio's own nbd engine's, without a block device",
            0.8,
            0.95,
            ratio(part, "remote", _READ_WRITE_32, FIO_NBD),
        ),
    )


TARGETS = (
    _more(
        "VM, null, 4k QD32, IOPS / qemu-storage-daemon's", 1.3, 1.8, ratio("vm", "null", _READ_WRITE_32, QSD)
    ),
    _more(
        "VM, file, 4k QD32, IOPS / our own null's",
        0.85,
        0.95,
        ratio("vm", "file", _READ_WRITE_32, OURS, peer_kind="null"),
    ),
    _more(
        "VM, file, 4k QD32, IOPS / qemu-storage-daemon's", 1.5, 2, ratio("vm", "file", _READ_WRITE_32, QSD)
    ),
    _less(
        "VM, file, 4k QD1, mean latency / qemu-storage-daemon's",
        0.4,
        0.25,
        ratio("vm", "file", _QD1, QSD, pick=_mean, more=False),
    ),
    _more(
        "VM, file, 128k sequential, IOPS / qemu-storage-daemon's", 1.2, 2, ratio("vm", "file", _LARGE, QSD)
    ),
    _more("VM, file, 4k QD32, IOPS / ublk's", 0.7, 1.1, ratio("vm", "file", _READ_WRITE_32, "ublk")),
    _more("VM, file, 4k QD32, IOPS / loop's", 0.35, 0.7, ratio("vm", "file", _READ_WRITE_32, "loop")),
    _more(
        "native vhost-user, null, 4k QD32, IOPS / qemu-storage-daemon's",
        2,
        3,
        ratio("native", "null", _NATIVE_32, QSD),
    ),
    _more(
        "native vhost-user, file, 4k QD32, IOPS / qemu-storage-daemon's fastest",
        2,
        4,
        ratio("native", "file", _NATIVE_32, QSD),
    ),
    *(
        _less(
            f"native vhost-user, {kind}, 4k QD32, the server's CPU time per request / qemu-storage-daemon's",
            0.5,
            0.3,
            ratio("native", kind, _NATIVE_32, QSD, pick=_server_cpu, more=False),
        )
        for kind in ("null", "file")
    ),
    *_remote("remote", "remote, a network between", _OVER_A_NETWORK),
    *_remote("loopback", "remote, on TCP loopback", _ON_LOOPBACK),
    _less("idle volume, CPU", 0, 0, _scale("cpu_ms_per_s"), "ms/s"),
    _less("idle volume, private memory beyond the first", 6, 3, _scale("private_mib_beyond_first"), "MiB"),
    _less("attach to first request served, without the kernel's part", 150, 50, _first_io, "ms"),
)
