"""In the VM: fio on ours and on the peers, same boot, same image on tmpfs, interleaved.

All servers are up at once, idle but for the one that is measured, and every job goes through all of them before
the next: a change of the machine's mood meets neighbours, not one side of a ratio. Jobs and servers that a target
is about are run in every round, the others in the first ones only.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench import fio, peers
from bench.results import Missing, Run, conditions
from bench.servers import BenchError, Server, ours, qemu_storage_daemon, tool, without_scheduler

IMAGE_BYTES = 512 << 20
SCRATCH = Path("/mnt/scratch")
TARGET_JOBS = (
    *(fio.small(operation, depth) for depth in (1, 32) for operation in ("randread", "randwrite")),
    *fio.LARGE,
)


@dataclass(frozen=True)
class Effort:
    """How much is measured: rounds of what targets are about, rounds of everything, seconds of each run."""

    rounds: int = 5
    wide_rounds: int = 1
    runtime_s: float = 1.5


QUICK = Effort(rounds=1, wide_rounds=0, runtime_s=0.5)


def servers(image: Path) -> tuple[Server, ...]:
    """Everybody, ours first, who serves the image or nothing."""
    file = f"driver=file,filename={image},aio=io_uring,cache.direct=on,discard=unmap,locking=off"
    return (
        ours("null", f"null:{IMAGE_BYTES}"),
        qemu_storage_daemon("null", f"driver=null-co,size={IMAGE_BYTES},read-zeroes=off"),
        peers.ublk("null", 0, "null"),
        peers.null_blk(),
        ours("file", f"file:{image}"),
        qemu_storage_daemon("file", file),
        peers.ublk("file", 1, "loop", "--file", str(image)),
        peers.loop(image),
        peers.nbd(image),
    )


def measure(effort: Effort, folder: Path = SCRATCH) -> dict[str, Any]:
    """Measure everything, with one queue and with two; returns the raw figures."""
    tool("modprobe", "-a", "vduse", "virtio-vdpa", "vhost-vdpa")
    image = folder / "bench.img"
    _fill(image)
    found = Found()
    try:
        for queues in (1, 2):
            try:
                _measure(found, servers(image), queues, effort)
            except BenchError as error:  # what was measured before is kept
                print(f"bench: queues {queues}: {error}", flush=True)
                found.missing.append(Missing("all", "all", f"queues: {queues}, the rest", str(error)))
    finally:
        image.unlink()
    where = tool("stat", "--file-system", "--format=%T", str(folder)).strip()
    about = conditions(
        runtime_s=effort.runtime_s, rounds=effort.rounds, file_system=where, versions=_versions()
    )
    return {"conditions": about, "runs": found.runs, "missing": found.missing}


class Found:
    """What was measured and what could not be."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.missing: list[Missing] = []


def _measure(found: Found, everybody: Sequence[Server], queues: int, effort: Effort) -> None:
    with ExitStack() as up:
        targets: dict[str, tuple[Server, fio.Target]] = {}
        for server in everybody:
            if queues > server.max_queues:
                continue
            try:
                target = without_scheduler(up.enter_context(server.start(queues)))
            except (BenchError, OSError, ValueError) as error:
                found.missing.append(Missing(server.name, server.kind, f"queues: {queues}", str(error)))
                print(f"bench: {server.name} {server.kind}: {error}", flush=True)
                continue
            targets[f"{server.name}-{server.kind}"] = (server, target)
        # Targets are about one queue; with two there is the width only, or one round of it for a smoke test.
        rounds = max(effort.rounds, effort.wide_rounds) if queues == 1 else max(effort.wide_rounds, 1)
        for number in range(rounds):
            wide = number < effort.wide_rounds
            for job in fio.ALL if wide else TARGET_JOBS:
                every = wide or number == 0
                chosen = {n: t for n, (s, t) in targets.items() if every or s.in_targets}
                answers = fio.run(
                    chosen, job, runtime_s=effort.runtime_s, threads=queues, size_bytes=IMAGE_BYTES
                )
                if fio.HUNG in answers.values():
                    raise BenchError(f"{job.name}: {fio.HUNG}")
                for name, answer in answers.items():
                    keep(found, targets[name][0], answer, job=job.name, queues=queues, number=number)


def keep(
    found: Found, server: Server, answer: fio.Figures | str, *, job: str, queues: int, number: int
) -> None:
    """Keep an answer of fio's, and print it."""
    if isinstance(answer, str):
        found.missing.append(Missing(server.name, server.kind, f"{job}, queues: {queues}", answer))
        print(f"bench: round {number}, {job}, {server.name} {server.kind}: {answer}", flush=True)
        return
    found.runs.append(Run(server.name, server.kind, job, queues, number, **asdict(answer)))
    print(
        f"round {number}, queues {queues}, {job}, {server.kind}, {server.name}: "
        f"{answer.iops:.0f} IOPS, {answer.mean_us:.0f} µs, p99 {answer.p99_us:.0f} µs, {answer.cpu_us:.0f} µs CPU",
        flush=True,
    )


def _fill(image: Path) -> None:
    """Make the image: every block written, so that no server reads holes."""
    block = os.urandom(1 << 20)
    with image.open("wb") as file:
        for _ in range(IMAGE_BYTES >> 20):
            file.write(block)


def _versions() -> dict[str, str]:
    """What the peers say about themselves."""
    found = {}
    for argv in (("qemu-storage-daemon", "--version"), ("nbdkit", "--version"), ("fio", "--version")):
        try:
            found[argv[0]] = tool(*argv).splitlines()[0]
        except BenchError:
            found[argv[0]] = "not available"
    return found
