"""The in-flight log's file: used for the device that it was made for, and for no other."""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.dataplane import inflight
from csi_vduse.dataplane.engine import inflight_bytes, init_inflight
from csi_vduse.dataplane.inflight import InflightLog, LogIdentity
from csi_vduse.errors import DataLoss

IDENTITY = LogIdentity(boot_id="b", instance=7, queues=3, queue_size=256)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    inflight.create(tmp_path / "log", IDENTITY)
    opened = os.open(tmp_path / "log", os.O_RDWR)
    yield opened
    os.close(opened)


def test_parts_are_apart_large_enough_and_seen_by_the_next_worker(fd: int):
    log = InflightLog(fd, IDENTITY)
    for index in range(3):
        part = log.part(index)
        assert len(part) >= max(inflight_bytes(256, packed=packed) for packed in (False, True))
        part[:] = bytes([index + 1]) * len(part)
    log.begin(0)
    assert bytes(log.part(1)) == bytes(len(log.part(1)))
    log.part(2)[0] = 9
    assert InflightLog(fd, IDENTITY).part(2)[0] == 9


@pytest.mark.parametrize(
    "other",
    [{"boot_id": "c"}, {"instance": 8}, {"queues": 2}, {"queue_size": 128}],
    ids=lambda o: next(iter(o)),
)
def test_the_log_of_another_device_is_refused(fd: int, other: dict[str, Any]):
    with pytest.raises(DataLoss, match="not of this device"):
        InflightLog(fd, replace(IDENTITY, **other))


def test_a_damaged_or_shortened_log_is_refused(fd: int):
    os.ftruncate(fd, 8192)
    with pytest.raises(DataLoss, match="geometry"):
        InflightLog(fd, IDENTITY)
    os.pwrite(fd, b"\xff" * 16, 0)
    with pytest.raises(DataLoss, match="damaged"):
        InflightLog(fd, IDENTITY)


def test_a_driver_with_other_features_is_refused(fd: int):
    log = InflightLog(fd, IDENTITY)
    log.check(0x1234)  # nobody was served yet
    log.begin(0x1234)
    InflightLog(fd, IDENTITY).check(0x1234)
    with pytest.raises(DataLoss, match="features"):
        log.check(0x1235)


def test_a_log_is_never_made_over_another(tmp_path: Path, fd: int):
    with pytest.raises(FileExistsError):
        inflight.create(tmp_path / "log", IDENTITY)


def test_a_queue_is_begun_when_its_engine_has_written_its_part(fd: int):
    log = InflightLog(fd, IDENTITY)
    log.begin(1)
    assert not log.was_begun(1)
    with contextlib.closing(mmap.mmap(-1, 1 << 20)) as memory:
        init_inflight(memory, 256, packed=False)
        log.part(1)[:64] = memory[:64]
    assert log.was_begun(1)
    assert not log.was_begun(0)
