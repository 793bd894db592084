"""One fio job on several devices, one after the other, and the figures that are kept of it.

One process runs the job on all devices: in an emulated machine fio takes a second to start, and figures of two
servers are the better to compare the closer together they are taken. Around each run fio takes a look at the
machine's and the server's CPU time (bench/cpu.py).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import cpu

# What fio may take beside running: start, and laying out its buffers.
_START_S = 30.0
_EACH_S = 10.0
HUNG = "fio did not end: a device hangs"
_BOTH_CPUS = ("--cpus_allowed=0-1", "--cpus_allowed_policy=split")


@dataclass(frozen=True)
class Job:
    """What fio does.

    depth: the number of requests that it keeps in flight, per thread; iops: it makes as many in a second, at random
    moments, and keeps no more than depth in flight; None: as many as it can.
    """

    name: str
    operation: str
    block_bytes: int
    depth: int
    iops: int | None = None


@dataclass(frozen=True)
class Target:
    """A device, and the processes that serve it; none if the kernel does.

    options: lines of fio's job file beside the usual ones; with an `uri` there is no device, fio goes there itself.
    """

    device: Path
    pids: tuple[int, ...]
    options: tuple[str, ...] = ()


@dataclass(frozen=True)
class Figures:
    """What came out: see bench.results.Run."""

    iops: float
    mean_us: float
    p50_us: float
    p99_us: float
    p999_us: float
    cpu_us: float
    server_cpu_us: float | None
    switches: float


def small(operation: str, depth: int) -> Job:
    """A job of 4 KiB requests."""
    return Job(f"4k {operation} QD{depth}", operation, 4096, depth)


SMALL = tuple(
    small(operation, depth) for operation in ("randread", "randwrite", "randrw") for depth in (1, 8, 32, 128)
)
LARGE = (Job("128k read QD8", "read", 131072, 8), Job("128k write QD8", "write", 131072, 8))
ALL = (*SMALL, *LARGE)


def run(
    targets: Mapping[str, Target], job: Job, *, runtime_s: float, threads: int, size_bytes: int
) -> dict[str, Figures | str]:
    """Run the job on each target for runtime_s seconds, with direct I/O on its first size_bytes.

    Returns the figures by the target's name, or what went wrong there.
    """
    with tempfile.TemporaryDirectory(prefix="bench-fio-") as name:
        folder = Path(name)
        # What names a section goes through a shell in fio, so it is not the target's name.
        sections = {name: f"target{number}" for number, name in enumerate(targets)}
        (folder / "job").write_text("".join(_section(sections[each], targets[each]) for each in targets))
        argv = ["fio", "--direct=1", "--ioengine=libaio", f"--rw={job.operation}", f"--bs={job.block_bytes}"]
        argv += [
            f"--iodepth={job.depth}",
            f"--size={size_bytes}",
            "--time_based",
            f"--runtime={round(runtime_s * 1000)}ms",
        ]
        argv += [f"--numjobs={threads}", "--group_reporting"]
        if job.iops:
            # Of each direction; for one that the job has not it means nothing.
            rate = job.iops // (2 if job.operation.endswith("rw") else 1)
            argv += [f"--rate_iops={rate},{rate}", "--rate_process=poisson"]
        argv += _BOTH_CPUS if threads > 1 and (os.cpu_count() or 1) > 1 else ()
        argv += ["--output-format=json", "--output=out", "job"]
        try:
            done = subprocess.run(
                argv,
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,
                timeout=_START_S + (runtime_s + _EACH_S) * len(targets),
            )
            text = (folder / "out").read_text()
            report = json.loads(text[text.index("{") :])
        except subprocess.TimeoutExpired:
            return dict.fromkeys(targets, HUNG)
        except (OSError, ValueError):
            return dict.fromkeys(targets, f"fio ended with {done.returncode}: {done.stderr.strip()[-300:]}")
        reports = {section["jobname"]: section for section in report["jobs"]}
        return {
            each: _figures(folder, sections[each], targets[each], reports.get(sections[each]))
            for each in targets
        }


def _section(name: str, target: Target) -> str:
    """The part of fio's job file for one device. With several threads each takes looks of its own ($$)."""
    words = shlex.join(cpu.files(target.pids))
    place = target.options or (f"filename={target.device}",)
    lines = [f"[{name}]", "stonewall", *place]
    # fio appends a redirection of its own, which the `:` takes.
    lines += [f"exec_{when}run=cat {words} > look.{name}.{when}.$$ || :" for when in ("pre", "post")]
    return "\n".join(lines) + "\n"


def _figures(folder: Path, name: str, target: Target, section: dict[str, Any] | None) -> Figures | str:
    if section is None:
        return "fio did not come to it"
    if section["error"]:
        return f"fio: {os.strerror(section['error'])}"
    sides = [section[side] for side in ("read", "write") if section[side]["total_ios"]]
    count = sum(side["total_ios"] for side in sides)
    if not count:
        return "no request was completed"
    before = _looks(folder, f"look.{name}.pre.*")[0]
    used = _looks(folder, f"look.{name}.post.*")[-1].since(before)
    return Figures(
        iops=sum(side["iops"] for side in sides),
        mean_us=sum(side["clat_ns"]["mean"] * side["total_ios"] for side in sides) / count / 1e3,
        p50_us=_percentile(sides, "50.000000"),
        p99_us=_percentile(sides, "99.000000"),
        p999_us=_percentile(sides, "99.900000"),
        cpu_us=used.machine_s / count * 1e6,
        server_cpu_us=used.server_s / count * 1e6 if target.pids else None,
        switches=used.switches / count,
    )


def _percentile(sides: list[dict[str, Any]], name: str) -> float:
    """Of reads or of writes, whichever is worse, in microseconds."""
    return max(float(side["clat_ns"]["percentile"][name]) for side in sides) / 1e3


def _looks(folder: Path, pattern: str) -> list[cpu.Look]:
    return sorted(
        (cpu.parse(path.read_text()) for path in folder.glob(pattern)), key=lambda look: look.switches
    )
