"""The servers under test in the VM: each makes a block device that fio can open, and takes it away again.

A server starts in a context and yields its device and processes. All of a kind serve the same image (or
nothing), with queues of 256 entries and no I/O scheduler, so that a difference between two rows is a difference
between two servers. Peers that the kernel or other projects bring are in bench/peers.py.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import cpu
from bench.fio import Target
from bench.results import OURS, QSD

START_TIMEOUT_S = 120.0
QUEUE_SIZE = 256
CSI_VDUSE = str(Path(sys.executable).parent / "csi-vduse")

Start = Callable[[int], AbstractContextManager[Target]]


class BenchError(Exception):
    """A server could not be started, or a tool failed: stated in the tables."""


@dataclass(frozen=True)
class Server:
    """Somebody who serves a block device.

    kind: "null", "file" or "remote"; start: given the number of queues; in_targets: whether a target of ours is about
    it, so that it is measured often; max_queues: more than that it does not have.
    """

    name: str
    kind: str
    start: Start
    in_targets: bool = True
    max_queues: int = 64


def ours(kind: str, backend: str) -> Server:
    """`csi-vduse export` of a backend such as file:PATH or null:SIZE."""

    @contextmanager
    def start(queues: int) -> Iterator[Target]:
        argv = [CSI_VDUSE, "export", "--bus", "virtio_vdpa", "--backend", backend]
        argv += ["--queues", str(queues), "--queue-size", str(QUEUE_SIZE), f"bench-{kind}"]
        with running(argv, stdout=subprocess.PIPE) as process:
            device = first_line(process)
            yield Target(Path(device), cpu.family(process.pid))

    return Server(OURS, kind, start)


def qemu_storage_daemon(kind: str, blockdev: str) -> Server:
    """qemu-storage-daemon's vduse-blk export of a block node described by `blockdev`."""

    @contextmanager
    def start(queues: int) -> Iterator[Target]:
        name = f"bench-qsd-{kind}"
        export = f"type=vduse-blk,id=e,node-name=n,name={name},num-queues={queues}"
        export += f",queue-size={QUEUE_SIZE},writable=on"
        argv = ["qemu-storage-daemon", "--blockdev", f"{blockdev},node-name=n", "--export", export]
        with running(argv) as process:
            wait(Path(f"/dev/vduse/{name}").exists, process, "its VDUSE device")
            tool("vdpa", "dev", "add", "name", name, "mgmtdev", "vduse")
            try:
                yield Target(disk(name), cpu.family(process.pid))
            finally:
                tool("vdpa", "dev", "del", name)

    return Server(QSD, kind, start)


def disk(name: str) -> Path:
    """Return the disk of a VDUSE device that is bound to virtio_vdpa."""
    (block,) = Path(f"/sys/bus/vdpa/devices/{name}").glob("virtio*/block/*")
    return Path("/dev") / block.name


def without_scheduler(target: Target) -> Target:
    """The same target, its requests going to the driver as they come."""
    (Path("/sys/block") / target.device.name / "queue/scheduler").write_text("none")
    return target


@contextmanager
def running(argv: list[str], stdout: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """Run a server; it is asked to end when the body has ended, and made to if that does not help."""
    try:
        process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=stdout, text=True)
    except OSError as error:
        raise BenchError(f"{argv[0]} is not available: {error.strerror}") from error
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            print(f"bench: {argv[0]} did not end when asked to", file=sys.stderr, flush=True)
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()


def first_line(process: subprocess.Popen[str]) -> str:
    """The first line that a server prints when it serves."""
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        line = process.stdout.readline().strip() if process.stdout is not None else ""
    finally:
        watchdog.cancel()
    if not line:
        raise BenchError(f"it did not start; exit code {process.wait(START_TIMEOUT_S)}, see what it printed")
    return line


def wait(condition: Callable[[], bool], process: subprocess.Popen[str] | None, what: str) -> None:
    """Wait until it is true, or the process has ended, or too much time has passed."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while not condition():
        if process is not None and process.poll() is not None:
            raise BenchError(f"it ended with {process.returncode} before {what} was there")
        if time.monotonic() > deadline:
            raise BenchError(f"{what} did not appear within {START_TIMEOUT_S:g} s")
        time.sleep(0.05)


def tool(*argv: str) -> str:
    """Run a program to its end; returns what it printed."""
    try:
        done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=START_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BenchError(f"{argv[0]}: {error}") from error
    if done.returncode:
        raise BenchError(
            f"{' '.join(argv)} ended with {done.returncode}: {(done.stdout + done.stderr).strip()}"
        )
    return done.stdout


@contextlib.contextmanager
def undone_by(*argv: str) -> Iterator[None]:
    """Run a program when the body has ended."""
    try:
        yield
    finally:
        tool(*argv)
