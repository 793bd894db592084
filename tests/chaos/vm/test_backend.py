"""Backends that are late, hang, fail, or are full, and come back."""

from __future__ import annotations

import contextlib
import errno
import random
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_vduse.dataplane.engine import AWAY_S
from tests.chaos.effort import Effort
from tests.chaos.vm import events, kernel_log
from tests.chaos.vm.faults import FaultyBackend, faulty_backend
from tests.chaos.vm.load import SHAPES, Shape, make_image, one_attached, under_load
from tests.vm.conftest import MIB, RunningAgent, leaves_nothing, wait_until
from tests.vm.exports import tool


@pytest.fixture
def backend(folder: Path) -> Iterator[FaultyBackend]:
    with faulty_backend(folder) as faulty:
        yield faulty


@pytest.mark.usefixtures("clean")
def test_backend_that_is_late_costs_time_and_nothing_else(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, backend: FaultyBackend
) -> None:
    with (
        one_attached(shared, folder, "late", dice.choice(SHAPES), backend.image) as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        for _ in range(2):
            backend.be_late(effort.late_s)
            wait_until(lambda: backend.waiting > 0, "late requests")
            time.sleep(effort.late_s)
            load.goes_on()
            backend.be_late(0)
            events.goes_on(shared, volume.id)


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("error", [errno.EIO, errno.ENOSPC], ids=["EIO", "ENOSPC"])
def test_backend_that_fails_and_comes_back(
    shared: RunningAgent,
    folder: Path,
    effort: Effort,
    dice: random.Random,
    backend: FaultyBackend,
    error: int,
) -> None:
    """Its requests wait, which is told, and are done when it is back."""
    with (
        one_attached(shared, folder, "fails", dice.choice(SHAPES), backend.image) as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        for _ in range(2):
            backend.fail(error)
            name = errno.errorcode[error]
            wait_until(lambda name=name: name in reason(shared, volume.id), "word of the failure")
            wait_until(lambda: events.inspect(shared, volume.id).stats.waiting > 0, "count of them")
            time.sleep(effort.late_s)
            load.goes_on()
            backend.fail(0)
            events.goes_on(shared, volume.id)
        wait_until(lambda: reason(shared, volume.id) == "", "end of the waiting")


def reason(agent: RunningAgent, volume_id: str) -> str:
    """What is said of the volume; asking its worker refreshes it."""
    events.inspect(agent, volume_id)
    return events.inspect(agent, volume_id).attachment.state_reason


@pytest.mark.usefixtures("clean")
def test_worker_killed_while_its_backend_fails(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, backend: FaultyBackend
) -> None:
    """What waited is in flight for the next worker too, and waits on or is done there."""
    with (
        one_attached(shared, folder, "fails", dice.choice(SHAPES), backend.image) as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        backend.fail(errno.ENOSPC)
        wait_until(lambda: "ENOSPC" in reason(shared, volume.id), "word of the failure")
        events.kill_worker(shared, volume.id)
        events.a_moment(dice, effort.late_s)
        backend.fail(0)
        events.wait_for_writes(shared, volume.id)
        load.goes_on()


def test_backend_that_stays_away_is_an_error_in_the_end(
    shared: RunningAgent, folder: Path, backend: FaultyBackend
) -> None:
    """EIO may be a disk that is broken: the application hears of it, later, and the volume works when it is mended."""
    with (
        kernel_log.stays_quiet(except_for="dev vd"),
        leaves_nothing(shared),
        one_attached(shared, folder, "broken", Shape(1, False, False), backend.image) as volume,
    ):
        backend.fail(errno.EIO)
        begin = time.monotonic()
        assert write_one(volume.disk) != 0
        assert time.monotonic() - begin >= AWAY_S
        backend.fail(0)
        assert write_one(volume.disk) == 0
        assert (folder / "backing.raw").read_bytes()[:4096] == bytes(4096)


def write_one(disk: Path) -> int:
    argv = ["dd", "if=/dev/zero", f"of={disk}", "bs=4k", "count=1", "oflag=direct", "status=none"]
    return subprocess.run(argv, check=False, timeout=600, stderr=subprocess.DEVNULL).returncode


@pytest.mark.usefixtures("clean")
def test_worker_killed_while_its_backend_hangs(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, backend: FaultyBackend
) -> None:
    """The next worker writes only when the last request of the dead one has ended, or the old would undo the new."""
    with (
        one_attached(shared, folder, "hangs", dice.choice(SHAPES), backend.image) as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        for _ in range(2):
            pid = events.worker_of(shared, volume.id)
            backend.hold(on=True)
            wait_until(lambda: backend.waiting > 0, "requests that hang")
            events.kill_if_there({pid})
            events.a_moment(dice, effort.late_s)
            load.goes_on()
            backend.hold(on=False)
            wait_until(
                lambda pid=pid: events.worker_of(shared, volume.id) != pid,
                "replacement",
                events.REPLACED_WITHIN_S,
            )
            events.wait_for_writes(shared, volume.id)


@pytest.mark.usefixtures("clean")
def test_one_hanging_volume_does_not_slow_another(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, backend: FaultyBackend
) -> None:
    """Neither its I/O nor attach and detach of others; how long it hangs is counted."""
    with (
        one_attached(shared, folder, "hanging", Shape(1, False, False), backend.image) as hanging,
        under_load([hanging], folder, dice.randrange(1 << 30)) as load,
    ):
        backend.hold(on=True)
        wait_until(lambda: backend.waiting > 0, "requests that hang")
        for number in range(2):
            with one_attached(shared, folder, f"other-{number}", dice.choice(SHAPES)) as other:
                tool("dd", "if=/dev/zero", f"of={other.target}/file" if other.shape.ext4 else f"of={other.disk}",
                     "bs=64k", "count=16", "conv=fsync")  # fmt: skip
        load.goes_on()
        wait_until(lambda: events.inspect(shared, hanging.id).stats.unanswered_s > 1, "count of the time")
        backend.hold(on=False)
        wait_until(lambda: events.inspect(shared, hanging.id).stats.stalled_s > 1, "count of the stall")


@pytest.mark.usefixtures("clean")
def test_full_pool_makes_writes_wait_for_room(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random
) -> None:
    """The pool is a file system of its own, which somebody else fills; on it are two volumes."""
    pool = folder / "pool"
    pool.mkdir()
    tool("mount", "-t", "tmpfs", "-o", "size=64m", "pool", pool)
    try:
        with (
            one_attached(shared, folder, "full-0", SHAPES[0], make_image(pool / "0.raw")) as raw,
            one_attached(shared, folder, "full-1", SHAPES[1], make_image(pool / "1.raw")) as ext4,
            under_load([raw, ext4], folder, dice.randrange(1 << 30)) as load,
        ):
            hog = fill(pool)  # the load has written a small part of what it will
            wait_until(
                lambda: any("ENOSPC" in reason(shared, each.id) for each in (raw, ext4)),
                "word of the full pool",
                events.REPLACED_WITHIN_S,
            )
            events.a_moment(dice, effort.late_s)
            load.goes_on()
            hog.unlink()
            for volume in (raw, ext4):
                events.goes_on(shared, volume.id)
                wait_until(lambda v=volume: reason(shared, v.id) == "", "end of the waiting")
    finally:
        tool("umount", pool)


def fill(pool: Path) -> Path:
    """Take all the room that there is; returns the file that has it."""
    hog = pool / "hog"
    with contextlib.suppress(OSError), hog.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(MIB // 8))
    return hog
