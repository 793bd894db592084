"""The driver is unbound while it writes: requests fail, as on any disk that is pulled; what was acknowledged stays."""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.vm.conftest import MIB, PARALLEL, RunningAgent, leaves_nothing, wait_until
from tests.vm.test_agent import attach, detach

BLOCK_BYTES = 4096
BLOCKS = 4 * MIB // BLOCK_BYTES
WRITERS = 4
RESETS = 3
STAMP = struct.Struct("=QQ")  # block, how often it was written


class StampedWriter:
    """Overwrites its blocks of a disk in turn until the disk is gone; knows of each what was begun and acknowledged."""

    def __init__(self, disk: Path, begun: dict[int, int], acknowledged: dict[int, int]) -> None:
        self.begun = begun
        self.acknowledged = acknowledged
        self.count = 0
        self.error: OSError | None = None
        self._fd = os.open(disk, os.O_RDWR | os.O_DIRECT)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def join(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive(), "a write never ended"

    def _run(self) -> None:
        page = mmap.mmap(-1, BLOCK_BYTES)
        try:
            while True:
                for block in self.begun:
                    self.begun[block] += 1
                    page[:] = STAMP.pack(block, self.begun[block]) * (BLOCK_BYTES // STAMP.size)
                    if os.pwrite(self._fd, page, block * BLOCK_BYTES) != BLOCK_BYTES:
                        raise OSError(0, "a short write")
                    self.acknowledged[block] = self.begun[block]
                    self.count += 1
        except OSError as error:
            self.error = error
        finally:
            os.close(self._fd)


def check(disk: Path, writer: StampedWriter) -> None:
    """Every block holds one write, whole, which is not older than the last acknowledged one."""
    page = mmap.mmap(-1, BLOCK_BYTES)
    fd = os.open(disk, os.O_RDONLY | os.O_DIRECT)
    try:
        for block, least in writer.acknowledged.items():
            assert os.preadv(fd, [page], block * BLOCK_BYTES) == BLOCK_BYTES
            found, count = STAMP.unpack(page[: STAMP.size])
            assert page[:] == STAMP.pack(found, count) * (BLOCK_BYTES // STAMP.size), f"block {block} is torn"
            assert found == (block if count else 0)
            assert least <= count <= writer.begun[block], (
                f"block {block} has write {count}, not {least} or later; {writer.count} written, then {writer.error}"
            )
    finally:
        os.close(fd)


def disks(device: str) -> list[Path]:
    """The disk of a device; none while no driver is bound. It may have another name after each return."""
    found = Path("/sys/bus/vdpa/devices", device).glob("virtio*/block/*")
    return [disk for block in found if (disk := Path("/dev", block.name)).exists()]


@contextmanager
def unbound(disk: Path) -> Iterator[None]:
    """Without a driver for the disk, which is reset by that and by the driver's return."""
    virtio = Path(f"/sys/block/{disk.name}/device").resolve().name
    driver = Path("/sys/bus/virtio/drivers/virtio_blk")
    (driver / "unbind").write_text(virtio)
    try:
        yield
    finally:
        (driver / "bind").write_text(virtio)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("queues", [2, pytest.param(4, marks=PARALLEL)])
def test_no_acknowledged_write_is_lost_when_the_driver_is_reset_under_load(
    shared: RunningAgent, image: Path, queues: int, *, packed: bool
):
    with leaves_nothing(shared):
        device = attach(shared, image, queues=queues, packed=packed).device_name
        shares = [range(first, BLOCKS, WRITERS) for first in range(WRITERS)]
        begun = [dict.fromkeys(share, 0) for share in shares]
        acknowledged = [dict.fromkeys(share, 0) for share in shares]
        for _ in range(RESETS):
            (disk,) = disks(device)
            writers = [StampedWriter(disk, *each) for each in zip(begun, acknowledged, strict=True)]
            for writer in writers:
                wait_until(lambda writer=writer: writer.count > 50, "writing")
            with unbound(disk):
                for writer in writers:
                    writer.join()
                    assert writer.error is not None
            wait_until(lambda: bool(disks(device)), "return of the disk")
            (disk,) = disks(device)
            for writer in writers:
                check(disk, writer)
        detach(shared)
