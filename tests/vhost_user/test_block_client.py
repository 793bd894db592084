"""A disk behind the socket is a whole disk to a client that is not ours: QEMU's block layer with libblkio."""

from __future__ import annotations

import os
import random
import signal
import stat
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from lab.errors import CommandFailed
from lab.vhost_client import VhostClient, obtain
from tests.vhost_user.conftest import IMAGE_BYTES, MIB
from tests.vhost_user.exported import Exported

SEEDED = random.Random(7).randbytes(256 * 1024)
SEEDED_AT = 3 * MIB + 4096

Export = Callable[..., Exported]


@pytest.fixture
def client() -> VhostClient:
    return replace(obtain(), driver="virtio-blk-vhost-user")


@pytest.fixture
def seeded(image: Path) -> Path:
    with image.open("r+b") as file:
        file.seek(SEEDED_AT)
        file.write(SEEDED)
    return image


def content(image: Path, offset_bytes: int, length_bytes: int) -> bytes:
    with image.open("rb") as file:
        return os.pread(file.fileno(), length_bytes, offset_bytes)


def test_a_client_reads_and_writes_the_image(export: Export, client: VhostClient, seeded: Path) -> None:
    exported = export(f"file:{seeded}")
    assert client.read(exported.socket, SEEDED_AT, len(SEEDED)) == SEEDED
    commands = ["write -P 0x5a 8M 1M", "write -P 0xa5 8704k 4k", "flush", "read -P 0xa5 8704k 4k"]
    client.run(exported.socket, commands)
    # flushed while the server is still there: the bytes have to be in the image by now
    assert content(seeded, 8 * MIB, 512 * 1024) == b"\x5a" * (512 * 1024)
    assert content(seeded, 8 * MIB + 512 * 1024, 4096) == b"\xa5" * 4096
    assert content(seeded, 8 * MIB + 516 * 1024, 4096) == b"\x5a" * 4096
    assert exported.stop() == 0
    assert not exported.socket.exists()
    assert content(seeded, SEEDED_AT, len(SEEDED)) == SEEDED
    assert content(seeded, 9 * MIB, MIB) == bytes(MIB)


def test_discard_and_write_zeroes_read_back_as_zeros(
    export: Export, client: VhostClient, image: Path
) -> None:
    exported = export(f"file:{image}")
    used = image.stat().st_blocks
    client.run(exported.socket, ["write -P 1 16M 4M", "flush"])
    assert image.stat().st_blocks > used
    client.run(exported.socket, ["write -z 16M 2M", "discard 18M 2M", "flush", "read -P 0 16M 2M"])
    assert content(image, 16 * MIB, 2 * MIB) == bytes(2 * MIB)
    assert image.stat().st_blocks * 512 < used * 512 + 4 * MIB


def test_a_read_only_disk_cannot_be_written(export: Export, client: VhostClient, image: Path) -> None:
    exported = export(f"file:{image}", "--read-only")
    with pytest.raises(CommandFailed):
        client.run(exported.socket, ["write -P 0x11 0 4096", "flush"])
    assert content(image, 0, 4096) == bytes(4096)


def test_one_client_after_another_leaves_nothing_behind(
    export: Export, client: VhostClient, image: Path
) -> None:
    exported = export(f"file:{image}", "--queues", "2")
    client.run(exported.socket, ["write -P 1 0 4096"])
    wait_until_idle(exported)
    files = exported.open_files()
    threads = len(list(Path(f"/proc/{exported.pid}/task").iterdir()))
    for number in range(2, 7):
        client.run(exported.socket, [f"read -P {number - 1} 0 4096", f"write -P {number} 0 4096"])
    wait_until_idle(exported)
    assert exported.open_files() == files
    assert len(list(Path(f"/proc/{exported.pid}/task").iterdir())) == threads


def test_a_client_that_is_killed_costs_its_session_only(
    export: Export, client: VhostClient, image: Path
) -> None:
    exported = export(f"file:{image}")
    commands = ["write -P 1 0 4096", "flush"]
    killed = client.start(exported.socket, [*commands, "aio_write -P 2 1M 4M", "sleep 60000"])
    wait_for(lambda: "queue started" in exported.log_text())
    time.sleep(0.2)
    killed.kill()
    killed.wait()
    client.run(exported.socket, ["read -P 1 0 4096", "write -P 3 8k 4k", "read -P 3 8k 4k"])
    assert exported.log_text().count("front-end connected") == 2


def test_the_capacity_follows_the_file_on_sighup(export: Export, client: VhostClient, image: Path) -> None:
    exported = export(f"file:{image}")
    with pytest.raises(CommandFailed):
        client.run(exported.socket, [f"read {IMAGE_BYTES} 4096"])
    os.truncate(image, 2 * IMAGE_BYTES)
    os.kill(exported.pid, signal.SIGHUP)
    wait_for(lambda: "the disk has grown" in exported.log_text())
    client.run(exported.socket, [f"write -P 9 {2 * IMAGE_BYTES - 4096} 4096"])
    assert content(image, 2 * IMAGE_BYTES - 4096, 4096) == b"\x09" * 4096


def test_a_stale_socket_is_replaced_and_a_live_one_refused(
    export: Export, client: VhostClient, image: Path, tmp_path: Path
) -> None:
    exported = export("null:64M")
    second = Exported(exported.socket.parent, f"file:{image}")
    with pytest.raises(AssertionError, match="another server listens"):
        second.start()
    second.kill()
    client.run(exported.socket, ["read 0 4096"])
    exported.kill()
    assert stat.S_ISSOCK(exported.socket.stat().st_mode)
    exported.start()
    client.run(exported.socket, ["read 0 4096"])
    assert exported.stop() == 0
    exported.socket.write_text("precious")
    with pytest.raises(AssertionError, match="is no socket"):
        second.start()
    second.kill()
    assert exported.socket.read_text() == "precious"


def wait_until_idle(exported: Exported) -> None:
    """Wait until no front-end is connected any more."""

    def idle() -> bool:
        text = exported.log_text()
        ended = text.count("front-end disconnected") + text.count("connection ended")
        return text.count("front-end connected") == ended

    wait_for(idle)
    time.sleep(0.2)  # the line is written before what it is about has been taken down


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
