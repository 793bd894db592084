"""In the VM: one NBD server on TCP loopback, and everybody who makes a disk of it, same boot, interleaved.

The server is nbdkit with its memory plugin, one process for all. Its CPU time is what the tables call the server's, so that
the rest of the machine's is the client side: fio, the client, and all that the kernel does for both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from bench import fio
from bench.fio import Target
from bench.results import conditions
from bench.servers import (
    BenchError,
    Server,
    ours,
    qemu_storage_daemon,
    running,
    tool,
    undone_by,
    wait,
)
from bench.vm import Effort, Found, keep

KIND = "remote"
SIZE_BYTES = 256 << 20
PORT = 10809
URI = f"nbd://127.0.0.1:{PORT}/"
TARGET_JOBS = (
    *(fio.small(operation, depth) for depth in (1, 32) for operation in ("randread", "randwrite")),
    *fio.LARGE,
)
JOBS = (
    *(fio.small(operation, depth) for depth in (1, 8, 32, 128) for operation in ("randread", "randwrite")),
    *fio.LARGE,
)
KERNEL, FIO = "kernel nbd", "fio's nbd engine"


def servers() -> tuple[Server, ...]:
    """Everybody, ours first."""
    remote = f"driver=nbd,server.type=inet,server.host=127.0.0.1,server.port={PORT},export="
    return (
        ours(KIND, URI),
        kernel_nbd(0, 1),
        kernel_nbd(1, 4),
        qemu_storage_daemon(KIND, remote),
        Server(FIO, KIND, _fio_alone),
    )


def kernel_nbd(number: int, connections: int) -> Server:
    """The kernel's client."""

    @contextmanager
    def start(_queues: int) -> Iterator[Target]:
        tool("modprobe", "nbd")
        device = Path(f"/dev/nbd{number}")
        argv = ["-N", "", "127.0.0.1", str(PORT), str(device), "-C", str(connections), "-b", "512"]
        tool("nbd-client", *argv)
        with undone_by("nbd-client", "-d", str(device)):
            size = Path("/sys/block") / device.name / "size"
            wait(lambda: size.read_text().strip() != "0", None, f"the size of {device}")
            yield Target(device, ())

    return Server(f"{KERNEL}, {connections}", KIND, start)


@contextmanager
def _fio_alone(_queues: int) -> Iterator[Target]:
    """No block device at all: the limit."""
    yield Target(Path(), (), ("ioengine=nbd", f"uri={URI}"))


def measure(effort: Effort) -> dict[str, Any]:
    """Measure everything; returns the raw figures."""
    tool("modprobe", "-a", "vduse", "virtio-vdpa", "vhost-vdpa")
    found = Found()
    counts: list[dict[str, object]] = []
    chosen = os.environ.get("BENCH_REMOTE_SERVERS", "")
    with running(
        ["nbdkit", "--foreground", f"--port={PORT}", "--ipaddr=127.0.0.1", "memory", str(SIZE_BYTES)]
    ) as kit, ExitStack() as up:
        targets = _start(
            up, found, [s for s in servers() if not chosen or s.name in chosen.split("|")], kit.pid
        )
        _fill(targets)
        for number in range(max(effort.rounds, effort.wide_rounds)):
            for job in JOBS if number < effort.wide_rounds else TARGET_JOBS:
                answers = fio.run(
                    {name: t for name, (_, t) in targets.items()},
                    job,
                    runtime_s=effort.runtime_s,
                    threads=1,
                    size_bytes=SIZE_BYTES,
                )
                if fio.HUNG in answers.values():
                    raise BenchError(f"{job.name}: {fio.HUNG}")
                for name, answer in answers.items():
                    keep(found, targets[name][0], answer, job=job.name, queues=1, number=number)
    about = conditions(runtime_s=effort.runtime_s, rounds=effort.rounds, server="nbdkit memory, TCP loopback")
    return {"conditions": about, "runs": found.runs, "missing": found.missing, "syscalls": counts}
