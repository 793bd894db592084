"""In the VM: one NBD server, and everybody who makes a disk of it, same boot, interleaved.

The server is nbdkit with its memory plugin, one process for all. It runs on a storage machine (bench/network.py), where
the machine's CPU time is the client side's: fio, the client, and all that the kernel does for both. Or it runs
beside its clients, on TCP loopback, and its own time is what the tables call the server's.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from bench import cpu, fio, network, syscalls
from bench.fio import Target
from bench.results import FIO_NBD, KERNEL_NBD, OURS, QSD, Missing, conditions
from bench.servers import (
    BenchError,
    Server,
    ours,
    qemu_storage_daemon,
    running,
    tool,
    undone_by,
    wait,
    without_scheduler,
)
from bench.vm import Effort, Found, keep

KIND = "remote"
SIZE_BYTES = 256 << 20
PORT = 10809
LOOPBACK = "127.0.0.1"
TARGET_JOBS = (
    *(fio.small(operation, depth) for depth in (1, 32) for operation in ("randread", "randwrite")),
    *fio.LARGE,
)
JOBS = (
    *(fio.small(operation, depth) for depth in (1, 8, 32, 128) for operation in ("randread", "randwrite")),
    *fio.LARGE,
)
_COUNTED = fio.small("randread", 32)
# What users feel: how long a request takes while the disk is used, not at its limit. Of what the slower of two can do.
_MIXED = fio.small("randrw", 32)
_COMPARED = (OURS, f"{KERNEL_NBD} 1")
SHARES = (0.3, 0.6, 0.9)
_Targets = Mapping[str, tuple[Server, Target]]


def nbdkit(host: str) -> list[str]:
    """The server that listens on an address of this machine."""
    return ["nbdkit", "--foreground", f"--port={PORT}", f"--ipaddr={host}", "memory", str(SIZE_BYTES)]


def servers(host: str) -> tuple[Server, ...]:
    """Everybody who makes a disk of the server at this address, ours first."""
    remote = f"driver=nbd,server.type=inet,server.host={host},server.port={PORT},export="
    return (
        ours(KIND, _uri(host)),
        kernel_nbd(host, 0, 1),
        kernel_nbd(host, 1, 4),
        qemu_storage_daemon(KIND, remote),
        Server(FIO_NBD, KIND, lambda _queues: _fio_alone(host)),
    )


def kernel_nbd(host: str, number: int, connections: int) -> Server:
    """The kernel's client."""

    @contextmanager
    def start(_queues: int) -> Iterator[Target]:
        tool("modprobe", "nbd")
        device = Path(f"/dev/nbd{number}")
        argv = ["-N", "", host, str(PORT), str(device), "-C", str(connections), "-b", "512"]
        tool("nbd-client", *argv)
        with undone_by("nbd-client", "-d", str(device)):
            size = Path("/sys/block") / device.name / "size"
            wait(lambda: size.read_text().strip() != "0", None, f"the size of {device}")
            yield Target(device, ())

    return Server(f"{KERNEL_NBD} {connections}", KIND, start)


@contextmanager
def _fio_alone(host: str) -> Iterator[Target]:
    """No block device at all: the limit."""
    yield Target(Path(), (), ("ioengine=nbd", f"uri={_uri(host)}"))


def _uri(host: str) -> str:
    return f"nbd://{host}:{PORT}/"


def measure(effort: Effort, host: str) -> dict[str, Any]:
    """Measure everything; returns the raw figures. host: where the server is, LOOPBACK or the storage machine."""
    tool("modprobe", "-a", "vduse", "virtio-vdpa", "vhost-vdpa")
    found = Found()
    with ExitStack() as up:
        pids: tuple[int, ...] = ()
        if host == LOOPBACK:
            pids = cpu.family(up.enter_context(running(nbdkit(host))).pid)
        else:
            network.plug_in()
        tool("nbdinfo", "--size", _uri(host))  # it is there
        targets = _start(up, found, host, pids)
        _fill(next(target.device for _, target in targets.values() if not target.options))
        for number in range(max(effort.rounds, effort.wide_rounds)):
            for job in JOBS if number < effort.wide_rounds else TARGET_JOBS:
                answers = _run(targets, job, effort)
                if fio.HUNG in answers.values():
                    raise BenchError(f"{job.name}: {fio.HUNG}")
                for name, answer in answers.items():
                    keep(found, targets[name][0], answer, job=job.name, queues=1, number=number)
        _at_rates(found, targets, effort)
        counts = _count_syscalls(found, targets, effort)
    about = conditions(
        runtime_s=effort.runtime_s, rounds=effort.rounds, server=f"nbdkit memory, one process, at {host}"
    )
    return {"conditions": about, "runs": found.runs, "missing": found.missing, "syscalls": counts}


def paced(share: float, iops: int | None = None) -> fio.Job:
    """The job that makes so much of what the slower one can do."""
    return replace(_MIXED, name=f"4k randrw at {share:.0%}", iops=iops)


def _at_rates(found: Found, targets: _Targets, effort: Effort) -> None:
    """Ours and the kernel's client at the same rates, in turn."""
    compared = {name: targets[name] for name in _COMPARED if name in targets}
    limits = [
        answer.iops for answer in _run(compared, _MIXED, effort).values() if not isinstance(answer, str)
    ]
    if len(limits) < len(_COMPARED):
        found.missing.append(Missing(OURS, KIND, "rates", "one of the two that are compared is not there"))
        return
    for number in range(effort.rounds):
        for share in SHARES:
            job = paced(share, round(share * min(limits)))
            for name, answer in _run(compared, job, effort).items():
                keep(found, targets[name][0], answer, job=job.name, queues=1, number=number)


def _run(targets: _Targets, job: fio.Job, effort: Effort) -> dict[str, fio.Figures | str]:
    chosen = {name: target for name, (_, target) in targets.items()}
    return fio.run(chosen, job, runtime_s=effort.runtime_s, threads=1, size_bytes=SIZE_BYTES)


def _start(up: ExitStack, found: Found, host: str, pids: tuple[int, ...]) -> dict[str, tuple[Server, Target]]:
    targets = {}
    for server in servers(host):
        try:
            target = up.enter_context(server.start(1))
            if not target.options:
                without_scheduler(target)
        except (BenchError, OSError, ValueError) as error:
            found.missing.append(Missing(server.name, server.kind, "all", str(error)))
            print(f"bench: {server.name}: {error}", flush=True)
            continue
        targets[server.name] = (server, replace(target, pids=pids))
    return targets


def _fill(device: Path) -> None:
    """Write every block once: the server has no holes from then on."""
    argv = ["dd", "if=/dev/zero", f"of={device}", "bs=1M", f"count={SIZE_BYTES >> 20}", "oflag=direct"]
    subprocess.run([*argv, "status=none"], check=True, timeout=300)


def _count_syscalls(found: Found, targets: _Targets, effort: Effort) -> list[dict[str, object]]:
    """How many system calls of the client's own processes a request takes; a client in the kernel has none."""
    rows: list[dict[str, object]] = []
    for server in (OURS, QSD):
        pids = _pids_of(server)
        if server not in targets or not pids:
            continue
        try:
            with syscalls.counting():
                before = syscalls.counts(pids)
                answer = _run({server: targets[server]}, _COUNTED, effort)[server]
                calls = syscalls.counts(pids) - before
        except (BenchError, OSError) as error:
            found.missing.append(Missing(server, KIND, "system calls", str(error)))
            continue
        if not isinstance(answer, str):
            requests = answer.iops * effort.runtime_s
            rows.append({"server": server, "job": _COUNTED.name, "calls_per_request": calls / requests})
    return rows


def _pids_of(server: str) -> tuple[int, ...]:
    """The processes of a client, found by their command lines."""
    word = b"csi-vduse" if server == OURS else b"qemu-storage-daemon"
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes() and b"bench" in path.read_bytes() and b"remote" in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue  # it ended
    return tuple(found)
