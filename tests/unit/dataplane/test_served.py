"""Which queues a worker begins and which it resumes, on a device and an engine that only take notes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from csi_vduse.dataplane import config_space, inflight, messages
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.inflight import InflightLog, LogIdentity
from csi_vduse.dataplane.served import ServedDevice

SPEC = DeviceSpec(name="vol", capacity_bytes=1 << 20, queues=2, queue_size=64)
IDENTITY = LogIdentity("boot", 7, queues=2, queue_size=64)
FEATURES = config_space.F_VERSION_1


class Notes:
    """Device and engine: both queues are set up by a driver; `resumed` tells how each was started."""

    def __init__(self) -> None:
        self.fd = os.open("/dev/null", os.O_RDWR)
        self.resumed: dict[int, bool] = {}
        self.paused: dict[int, bool] = {}
        self.interrupts: list[int] = []

    def features(self) -> int:
        return FEATURES

    def queue_info(self, index: int) -> Any:
        return SimpleNamespace(ready=True, size=64, desc_iova=0, driver_iova=0, device_iova=0, avail_index=0)

    def iotlb_entries(self) -> list[Any]:
        return []

    def inject_queue_interrupt(self, index: int) -> None:
        self.interrupts.append(index)

    def start_queue(self, index: int, address: Any) -> None:
        self.resumed[index] = address.resume
        self.paused[index] = address.paused

    def at_once(self) -> Any:
        return contextlib.nullcontext()

    def pause_queue(self, index: int, timeout_s: float) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None


@pytest.fixture
def notes() -> Iterator[Notes]:
    made = Notes()
    yield made
    os.close(made.fd)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[InflightLog]:
    inflight.create(tmp_path / "log", IDENTITY)
    fd = os.open(tmp_path / "log", os.O_RDWR)
    yield InflightLog(fd, IDENTITY)
    os.close(fd)


def took_over(notes: Any, log: InflightLog) -> ServedDevice:
    return ServedDevice(notes, notes, SPEC, log, resume=True)


def test_a_driver_that_nobody_has_served_yet_is_waited_for_and_begun(notes: Notes, log: InflightLog):
    """The worker died after the reset; the driver has set its queues up, and its DRIVER_OK comes to the next worker.

    That one took the empty log for one of requests in flight, could not start the queues, and never did.
    """
    served = took_over(notes, log)
    assert notes.resumed == {}
    status = messages.STATUS_FEATURES_OK | messages.STATUS_DRIVER_OK
    served._set_status(1, status)
    assert notes.resumed == {0: False, 1: False}


def test_queues_that_the_dead_worker_did_not_come_to_are_begun(notes: Notes, log: InflightLog):
    log.begin(FEATURES)
    log.part(0)[8] = 1
    took_over(notes, log)
    assert notes.resumed == {0: True, 1: False}
    assert notes.interrupts == [0, 1]


def test_a_volume_that_is_held_stays_held_over_a_reset(notes: Notes, log: InflightLog):
    """Its queues were started and then paused: for a moment the volume was written while its snapshot was taken."""
    served = took_over(notes, log)
    ready = messages.STATUS_FEATURES_OK | messages.STATUS_DRIVER_OK
    served._set_status(1, ready)
    assert notes.paused == {0: False, 1: False}
    served.quiesce()
    served._set_status(2, 0)
    served._set_status(3, ready)
    assert notes.paused == {0: True, 1: True}
