"""The peers in the VM that are no VDUSE devices: loop, ublk, kernel nbd, and null_blk as fio's own ceiling."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench import cpu
from bench.fio import Target
from bench.servers import QUEUE_SIZE, BenchError, Server, running, tool, undone_by, wait
from lab.paths import CHECKOUT, cache_dir

_NBD = Path("/dev/nbd0")
_NULL_BLK = Path("/dev/nullb0")
_RUBLK = "rublk-*"  # tools/install-bench-deps.sh says which version


def loop(image: Path) -> Server:
    """The loop driver with direct I/O; it has one queue."""

    @contextmanager
    def start(_queues: int) -> Iterator[Target]:
        tool("modprobe", "loop")
        device = tool("losetup", "--direct-io=on", "--find", "--show", str(image)).strip()
        with undone_by("losetup", "--detach", device):
            if (Path("/sys/block") / Path(device).name / "loop/dio").read_text().strip() != "1":
                raise BenchError("the file system does not let the loop driver do direct I/O")
            yield Target(Path(device), ())

    return Server("loop", "file", start, max_queues=1)


def ublk(kind: str, number: int, *target: str) -> Server:
    """rublk, a ublk server: its null or loop target, the latter with direct I/O, which is its default."""

    @contextmanager
    def start(queues: int) -> Iterator[Target]:
        tool("modprobe", "ublk_drv")
        argv = [_rublk(), "add", *target, "--foreground", "--quiet", "-n", str(number)]
        device = Path(f"/dev/ublkb{number}")
        with running([*argv, "-q", str(queues), "-d", str(QUEUE_SIZE)], stdout=subprocess.DEVNULL) as process:
            wait(device.exists, process, str(device))
            with undone_by(_rublk(), "del", "-n", str(number)):
                yield Target(device, cpu.family(process.pid))

    return Server("ublk", kind, start, in_targets=kind == "file")


def nbd(image: Path) -> Server:
    """The kernel's NBD client with a local nbdkit over a unix socket, one connection per queue."""

    @contextmanager
    def start(queues: int) -> Iterator[Target]:
        tool("modprobe", "nbd")
        with tempfile.TemporaryDirectory(prefix="bench-nbd-") as folder:
            socket = Path(folder) / "socket"
            argv = ["nbdkit", "--foreground", "--exit-with-parent", "--unix", str(socket), "file", str(image)]
            with running(argv) as process:
                wait(socket.exists, process, "nbdkit's socket")
                tool("nbd-client", "-unix", str(socket), str(_NBD), "-C", str(queues))
                with undone_by("nbd-client", "-d", str(_NBD)):
                    size = Path("/sys/block") / _NBD.name / "size"
                    wait(lambda: size.read_text().strip() != "0", process, f"the size of {_NBD}")
                    yield Target(_NBD, cpu.family(process.pid))

    return Server("nbd", "file", start, in_targets=False)


def null_blk() -> Server:
    """The kernel's null device, completing in place: what fio itself reaches on this machine."""

    @contextmanager
    def start(queues: int) -> Iterator[Target]:
        options = ("nr_devices=1", "queue_mode=2", "irqmode=0", f"submit_queues={queues}")
        tool("modprobe", "null_blk", *options, f"hw_queue_depth={QUEUE_SIZE}", "bs=512", "gb=1")
        with undone_by("modprobe", "--remove", "null_blk"):
            yield Target(_NULL_BLK, ())

    return Server("null_blk", "null", start, in_targets=False)


def _rublk() -> str:
    for folder in (cache_dir(), CHECKOUT / ".cache"):
        for path in sorted((folder / "bin").glob(_RUBLK), reverse=True):
            return str(path)
    raise BenchError("rublk is not there: tools/install-bench-deps.sh builds it where there is cargo")
