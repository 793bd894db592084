"""Interrupts of a volume's queues and the processors that they come to, of which one goes offline."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_vduse.vdpa.interrupts import read_mask
from tests.vm.conftest import MIB, RunningAgent, leaves_nothing, wait_until
from tests.vm.test_agent import attach, detach
from tests.vm.test_recovery import verified_writing

pytestmark = pytest.mark.emulated("a second processor")

BUSY = bool(os.environ.get("PROCESSORS_BUSY"))  # by hand, with more than two: see docs/performance.md


@contextmanager
def offline(processor: int) -> Iterator[None]:
    switch = Path(f"/sys/devices/system/cpu/cpu{processor}/online")
    switch.write_text("0")
    try:
        yield
    finally:
        switch.write_text("1")


def await_writes(path: str) -> None:
    """Some hundred of them come back."""
    stat = Path("/sys/block", Path(path).name, "stat")  # Documentation/block/stat.rst
    before = int(stat.read_text().split()[4])
    wait_until(lambda: int(stat.read_text().split()[4]) > before + 300, "writes")


def test_interrupts_come_to_one_processor_and_leave_one_that_goes_offline(shared: RunningAgent, image: Path):
    last = (os.cpu_count() or 1) - 1
    with leaves_nothing(shared):
        attached = attach(shared, image, queues=1)
        mask = Path("/sys/class/vduse", attached.device_name, "vq0/irq_cb_affinity")
        assert read_mask(mask.read_text()) == {0}
        mask.write_text(f"{1 << last:x}")
        if BUSY:
            with verified_writing(attached.path):
                await_writes(attached.path)
                with offline(last):
                    wait_until(lambda: read_mask(mask.read_text()) == {0}, "another processor")
                    await_writes(attached.path)
        else:
            with offline(last):
                wait_until(lambda: read_mask(mask.read_text()) == {0}, "another processor")
                data = os.urandom(MIB)
                Path(attached.path).write_bytes(data)
                assert Path(attached.path).read_bytes()[:MIB] == data
        detach(shared)
