"""The raw figures: one record per run of a job on a server, kept as JSON, and medians over them.

What is kept true: a file of results is whole or absent, says under which conditions it was taken, and lists
what could not be measured beside what was.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lab.paths import results_dir

PARTS = ("vm", "remote", "loopback", "native", "instructions", "scale", "pause-native", "pause")
OURS = "csi-vduse"
QSD = "qemu-storage-daemon"
KERNEL_NBD = "kernel nbd, connections:"
FIO_NBD = "fio's nbd engine"


@dataclass(frozen=True)
class Run:
    """One job on one server, once. CPU is in microseconds of one CPU per completed request.

    kind: what the server stores into, "null", "file" or "remote"; cpu_us: the whole machine's, without idling;
    server_cpu_us: of the server's processes, None for a server inside the kernel or on another machine;
    switches: context switches of the whole machine per request, None where that was not looked at; p50_us, p999_us: as
    p99_us, and None in figures of before they were kept.
    """

    server: str
    kind: str
    job: str
    queues: int
    round: int
    iops: float
    mean_us: float
    p99_us: float | None
    cpu_us: float
    server_cpu_us: float | None
    switches: float | None
    p50_us: float | None = None
    p999_us: float | None = None


@dataclass(frozen=True)
class Missing:
    """A server, or one run of it, that could not be measured, and why."""

    server: str
    kind: str
    what: str
    reason: str


def median(runs: Iterable[Run], figure: Callable[[Run], float | None]) -> float | None:
    """The median of one figure over the runs that have it; None if none has."""
    values = [value for run in runs if (value := figure(run)) is not None]
    return statistics.median(values) if values else None


def folder() -> Path:
    """Where raw figures are kept; made if missing."""
    path = results_dir() / "bench"
    path.mkdir(parents=True, exist_ok=True)
    return path


def conditions(**more: object) -> dict[str, object]:
    """Under which conditions figures are taken: what a reader needs to judge or repeat them."""
    return {
        "taken_utc": time.strftime("%Y-%m-%d %H:%M", time.gmtime()),
        "kernel": platform.release(),
        "cpus": os.cpu_count(),
        "load_average_1min": round(os.getloadavg()[0], 2),
        **more,
    }


def save(part: str, figures: dict[str, Any]) -> Path:
    """Keep the figures of a part; returns the file."""
    path = folder() / f"{part}.json"
    fresh = path.with_suffix(".new")
    fresh.write_text(json.dumps(figures, indent=1, default=asdict) + "\n")
    fresh.replace(path)
    return path


def load(part: str, where: Path | None = None) -> dict[str, Any] | None:
    """The figures of a part that were kept, None if there are none."""
    path = (where or folder()) / f"{part}.json"
    return json.loads(path.read_text()) if path.is_file() else None


def runs_of(figures: dict[str, Any] | None) -> list[Run]:
    """The runs among the figures of a part."""
    return [Run(**each) for each in (figures or {}).get("runs", [])]


def missing_of(figures: dict[str, Any] | None) -> list[Missing]:
    """What the figures of a part say could not be measured."""
    return [Missing(**each) for each in (figures or {}).get("missing", [])]
