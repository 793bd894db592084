"""Instructions per request of the ring path: callgrind counts what the engine's thread executes.

bench/ring_cost.c drives the engine, with its null backend, in one process. Two runs that differ only in the
number of requests are subtracted, so that start and end cancel; the driver's own thread is told apart and not
counted. Counts do not depend on the machine's load, apart from how often the engine looks for work in vain.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench.results import conditions
from bench.servers import BenchError, tool
from csi_vduse.dataplane._build import COMPILE_ARGS
from lab.paths import CHECKOUT

_SOURCE = CHECKOUT / "csi_vduse/dataplane/src"
_DRIVER = CHECKOUT / "tests/ring"
_VALGRIND_S = 60.0
_STARTS = 11
_RINGS = ("split", "packed")
# Of ring_cost: what the way is, and the two numbers of requests whose difference is counted.
_WAYS = {
    "full": ("batches of a whole ring", 2048, 10240),
    "alone": ("one request at a time, kicked and waited for", 256, 1280),
}
_TOTAL = re.compile(r"^(?:totals|summary): (\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Cost:
    """Instructions of the engine's thread per request."""

    way: str
    instructions: float


def measure() -> dict[str, Any]:
    """Count; returns the raw figures."""
    with tempfile.TemporaryDirectory(prefix="bench-ring-") as name:
        program = _build(Path(name))
        costs = []
        for ring in _RINGS:
            for way, (text, *counts) in _WAYS.items():
                few, many = (_count(program, ring, way, count, Path(name)) for count in counts)
                costs.append(Cost(f"{ring} ring, {text}", (many - few) / (counts[1] - counts[0])))
                print(f"{costs[-1].way}: {costs[-1].instructions:.0f} instructions per request", flush=True)
        first_ns = sorted(int(tool(str(program), "split", "alone", "1").split()[0]) for _ in range(_STARTS))
    return {
        "conditions": conditions(valgrind=tool("valgrind", "--version").strip()),
        "costs": [asdict(cost) for cost in costs],
        "engine_to_first_request_us": first_ns[_STARTS // 2] / 1e3,
    }


def _build(folder: Path) -> Path:
    """Build ring_cost as the engine is built for use."""
    program = folder / "ring_cost"
    sources = [*_SOURCE.rglob("*.c"), *_DRIVER.glob("driver*.c"), CHECKOUT / "bench/ring_cost.c"]
    argv = ["gcc", *COMPILE_ARGS, f"-I{_SOURCE}", f"-I{_DRIVER}", *map(str, sorted(sources))]
    tool(
        *argv,
        "-o",
        str(program),
        "-Wl,--wrap=io_uring_submit_and_wait",
        "-luring",
        "-lssl",
        "-lcrypto",
        "-lpthread",
    )
    return program


def _count(program: Path, ring: str, way: str, count: int, folder: Path) -> int:
    """Instructions of the engine's thread in one run."""
    out = folder / f"callgrind.{ring}.{way}.{count}"
    # By KILL: valgrind heeds nothing else while a thread is in a system call that it does not know to block.
    argv = [
        "timeout",
        "--signal=KILL",
        f"{_VALGRIND_S:.0f}",
        "valgrind",
        "--quiet",
        "--tool=callgrind",
        "--separate-threads=yes",
        f"--callgrind-out-file={out}",
    ]
    # Without fairness the thread that waits for the other may be run again and again before it.
    argv += ["--fair-sched=try", str(program), ring, way, str(count)]
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BenchError(f"valgrind: {error}") from error
    if done.returncode:
        raise BenchError(f"{' '.join(argv)} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    # Thread 1 is the driver; the engine's only thread is the second.
    return int(_TOTAL.findall(Path(f"{out}-02").read_text())[-1])
