"""The worker process without a device: what it says of itself, how it prepares, and when it ends."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest

from csi_vduse import __version__
from csi_vduse.dataplane import channel, inflight, versions
from csi_vduse.dataplane.backend_spec import FileBackend, to_json
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.inflight import LogIdentity
from csi_vduse.dataplane.versions import hello_from_json
from csi_vduse.errors import DataLoss, FailedPrecondition, NotFound

MIB = 1 << 20
IDENTITY = LogIdentity("boot", 7, queues=1, queue_size=64)
PROGRAM = "from csi_vduse.cli.main import main; raise SystemExit(main())"


@dataclass
class Running:
    process: subprocess.Popen[bytes]
    control: socket.socket
    listen_path: Path

    def prepare(self, image: Path, log: Path) -> None:
        fields: dict[str, Any] = {
            "name": "v",
            "serial": "vol",
            "backend": to_json(FileBackend(image)),
            "capacity_bytes": MIB,
            "read_only": False,
            "queues": 1,
            "queue_size": 64,
            "block_size_bytes": 512,
            "packed": False,
            "inflight": asdict(IDENTITY),
        }
        fd = os.open(log, os.O_RDWR)
        try:
            channel.call(self.control, {"op": "prepare", **fields}, [fd])
        finally:
            os.close(fd)


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[Running]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listen_path = tmp_path / "control.sock"
    with theirs, ours:
        argv = ["worker", "--control-fd", str(theirs.fileno()), "--listen", str(listen_path)]
        process = subprocess.Popen([sys.executable, "-c", PROGRAM, *argv], pass_fds=[theirs.fileno()])
        theirs.close()
        yield Running(process, ours, listen_path)
        process.kill()
        process.wait()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(MIB)
    inflight.create(tmp_path / "log", IDENTITY)
    return path


def engine_on(image: Path) -> Engine:
    return Engine(
        backend=FileBackend(image),
        capacity_bytes=MIB,
        block_size_bytes=512,
        max_queues=1,
        read_only=False,
        serial="vol",
        event_fd=-1,
    )


def test_it_says_what_it_is_and_ends_when_nobody_wants_it(worker: Running):
    hello = hello_from_json(channel.call(worker.control, {"op": "ping"}))
    assert (hello.pid, hello.started, hello.version) == (worker.process.pid, False, __version__)
    assert hello.image != versions.IMAGE  # it was not forked from us
    worker.control.close()
    assert worker.process.wait(30) == 0


def test_it_prepares_beside_the_one_that_holds_the_image_and_leaves_it_alone(
    worker: Running, image: Path, tmp_path: Path
):
    serving = engine_on(image)
    worker.prepare(image, tmp_path / "log")
    serving.close()
    worker.prepare(image, tmp_path / "log")  # and holds nothing itself
    engine_on(image).close()


def test_it_tells_beforehand_that_it_will_not_be_able_to_serve(worker: Running, image: Path, tmp_path: Path):
    with pytest.raises(NotFound, match="missing"):
        worker.prepare(tmp_path / "missing", tmp_path / "log")
    log = tmp_path / "log"
    log.write_bytes(log.read_bytes().replace(b'"version": 1', b'"version": 9'))
    with pytest.raises(DataLoss, match="version 9"):
        worker.prepare(image, log)


def test_what_it_does_not_serve_it_cannot_release(worker: Running):
    with pytest.raises(FailedPrecondition, match="not been started"):
        channel.call(worker.control, {"op": "release"})
