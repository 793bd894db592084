"""Without a VM: vhost-user servers under one client, `qemu-img bench` of a QEMU with libblkio.

Ours and qemu-storage-daemon's vhost-user-blk serve nothing, or one image on tmpfs; the latter with each way of
asynchronous I/O that it has. The server runs on one set of CPUs with the client, as they come: pinning would
measure the pinning. CPU time is the server's own, from before to after the client's run.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import cpu
from bench.results import OURS, QSD, Missing, Run, conditions
from bench.servers import CSI_VDUSE, QUEUE_SIZE, BenchError, first_line, running, tool, wait
from lab import vhost_client

IMAGE_BYTES = 512 << 20
TMPFS = Path("/dev/shm")
_SECONDS = re.compile(r"Run completed in ([0-9.]+) seconds")
_CLIENT_S = 120.0
_PROBE_REQUESTS = 4000


@dataclass(frozen=True)
class Effort:
    """Rounds, and how long each run is made to take, roughly."""

    rounds: int = 5
    runtime_s: float = 2.5


QUICK = Effort(rounds=1, runtime_s=0.3)


@dataclass(frozen=True)
class Job:
    """Requests of 4 KiB, one after the other through the disk, `depth` in flight."""

    name: str
    write: bool
    depth: int


JOBS = tuple(
    Job(f"4k {'write' if write else 'read'} QD{depth}", write, depth)
    for depth in (1, 32)
    for write in (False, True)
)


@dataclass(frozen=True)
class Server:
    """A vhost-user server; argv is completed with its socket's path."""

    name: str
    kind: str
    argv: tuple[str, ...]
    says_ready: bool

    @contextmanager
    def start(self, socket: Path) -> Iterator[int]:
        """Serve; gives the server's process."""
        argv = [word.replace("SOCKET", str(socket)) for word in self.argv]
        with running(argv, stdout=subprocess.PIPE if self.says_ready else None) as process:
            if self.says_ready:
                first_line(process)
            else:
                wait(socket.exists, process, "its socket")
            yield process.pid


def servers(image: Path) -> tuple[Server, ...]:
    """Ours first."""
    file = f"driver=file,filename={image},cache.direct=on,locking=off"
    return (
        _ours("null", f"null:{IMAGE_BYTES}"),
        _qsd(QSD, "null", f"driver=null-co,size={IMAGE_BYTES},read-zeroes=off"),
        _ours("file", f"file:{image}"),
        *(_qsd(f"{QSD} {aio}", "file", f"{file},aio={aio}") for aio in ("io_uring", "threads", "native")),
    )


def _ours(kind: str, backend: str) -> Server:
    argv = (CSI_VDUSE, "export", "--vhost-user", "SOCKET", "--backend", backend, "--queues", "1")
    return Server(OURS, kind, (*argv, "--queue-size", str(QUEUE_SIZE), f"bench-{kind}"), says_ready=True)


def _qsd(name: str, kind: str, blockdev: str) -> Server:
    export = "type=vhost-user-blk,id=e,node-name=n,addr.type=unix,addr.path=SOCKET,writable=on,num-queues=1"
    argv = ("qemu-storage-daemon", "--blockdev", f"{blockdev},node-name=n", "--export", export)
    return Server(name, kind, argv, says_ready=False)


def measure(effort: Effort, folder: Path | None = None) -> dict[str, Any]:
    """Measure everything; returns the raw figures."""
    client = vhost_client.obtain()
    client = replace(client, driver="virtio-blk-vhost-user")
    about = conditions(rounds=effort.rounds, runtime_s=effort.runtime_s, client=client.version())
    runs: list[Run] = []
    missing: list[Missing] = []
    with ExitStack() as up:
        place = Path(up.enter_context(tempfile.TemporaryDirectory(prefix="bench-", dir=folder or TMPFS)))
        image = place / "image"
        block = os.urandom(1 << 20)
        with image.open("wb") as file:
            for _ in range(IMAGE_BYTES >> 20):
                file.write(block)
        serving: list[tuple[Server, Path, int]] = []
        for number, server in enumerate(servers(image)):
            socket = place / f"{number}.sock"
            try:
                serving.append((server, socket, up.enter_context(server.start(socket))))
            except BenchError as error:
                missing.append(Missing(server.name, server.kind, "all", str(error)))
        for round_number in range(effort.rounds):
            for job in JOBS:
                for server, socket, pid in serving:
                    try:
                        run = _measure(client, server, socket, pid, job=job, runtime_s=effort.runtime_s)
                    except BenchError as error:
                        missing.append(Missing(server.name, server.kind, job.name, str(error)))
                        continue
                    runs.append(replace(run, round=round_number))
                    print(
                        f"round {round_number}, {job.name}, {server.kind}, {server.name}: {run.iops:.0f} IOPS, "
                        f"{run.server_cpu_us:.2f} µs server CPU",
                        flush=True,
                    )
    versions = {"qemu-storage-daemon": tool("qemu-storage-daemon", "--version").splitlines()[0]}
    start_ms = float(tool(sys.executable, "-m", "bench.start"))
    about = {**about, "versions": versions}
    return {"conditions": about, "runs": runs, "missing": missing, "worker_start_ms": start_ms}


def _measure(
    client: vhost_client.VhostClient, server: Server, socket: Path, pid: int, *, job: Job, runtime_s: float
) -> Run:
    """One run, as long as asked for: a short one before says how many requests that takes."""
    probe_s = _client(client, socket, job, _PROBE_REQUESTS)
    count = max(_PROBE_REQUESTS, int(_PROBE_REQUESTS * runtime_s / max(probe_s, 0.001)))
    before = cpu.look(cpu.family(pid))
    seconds = _client(client, socket, job, count)
    used = cpu.look(cpu.family(pid)).since(before)
    return Run(
        server=server.name,
        kind=server.kind,
        job=job.name,
        queues=1,
        round=0,
        iops=count / seconds,
        mean_us=seconds / count * job.depth * 1e6,
        p99_us=None,
        cpu_us=used.machine_s / count * 1e6,
        server_cpu_us=used.server_s / count * 1e6,
        switches=used.switches / count,
    )


def _client(client: vhost_client.VhostClient, socket: Path, job: Job, count: int) -> float:
    """Let the client make that many requests; returns the seconds that it took, connecting left out."""
    image = f"driver={client.driver},path={socket},cache.direct=on"
    words = [
        "bench",
        "-c",
        str(count),
        "-d",
        str(job.depth),
        "-s",
        "4096",
        "-t",
        "none",
        "--image-opts",
        image,
    ]
    if job.write:
        words.insert(1, "-w")
    argv, environment = client.qemu_img(words)
    try:
        done = subprocess.run(
            argv,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_CLIENT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"the client did not end within {_CLIENT_S:.0f} s") from error
    found = _SECONDS.search(done.stdout)
    if done.returncode or not found:
        raise BenchError(
            f"the client ended with {done.returncode}: {(done.stdout + done.stderr).strip()[-300:]}"
        )
    return float(found[1])
