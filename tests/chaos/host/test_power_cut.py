"""The machine's power is cut under writes: what was flushed is there afterwards, and in order.

A cut is the end of QEMU by SIGKILL. The machine's disk is a file of the host, so what the guest's kernel had sent to
it survives; what is lost is everything that the guest still had in its memory: dirty pages, journals, unwritten
extents that were not converted yet.
"""

from __future__ import annotations

import random
import sys
import threading
from collections.abc import Iterator

import pytest

from lab.machine import Machine
from tests.chaos.effort import Effort

DISK_BYTES = 1 << 30
WRITING_TIMEOUT_S = 600
CHECK_TIMEOUT_S = 900


@pytest.fixture
def dark_machine() -> Iterator[Machine]:
    with Machine(kind="qemu", memory="2G", disk_bytes=DISK_BYTES, scratch_bytes=64 << 20) as machine:
        yield machine


def test_power_cut_keeps_what_was_flushed_and_its_order(
    dark_machine: Machine, effort: Effort, dice: random.Random
) -> None:
    files = 0
    for cycle in range(effort.power_cuts):
        flushed, more_files = write_until_cut(
            dark_machine, cycle, epochs=dice.randint(20, 400), files=dice.randint(3, 40)
        )
        files = max(files, more_files)
        dark_machine.boot()
        done = guest(dark_machine, "check", cycle, flushed, files)
        assert f"right: {files} files, epoch {flushed}" in done, done


def guest(machine: Machine, *words: object) -> str:
    argv = [sys.executable, "-m", "tests.chaos.host.guest", *map(str, words)]
    return machine.run(argv, timeout_s=CHECK_TIMEOUT_S).stdout


def write_until_cut(machine: Machine, cycle: int, *, epochs: int, files: int) -> tuple[int, int]:
    """Let it write until so much is safe, then cut; returns the last epoch and file that we were told are safe."""
    argv = [sys.executable, "-m", "tests.chaos.host.guest", "write", str(cycle)]
    command = machine.start(argv)
    watchdog = threading.Timer(WRITING_TIMEOUT_S, command.process.kill)
    watchdog.start()
    seen = {"flushed": 0, "file": 0}
    new_files = 0
    try:
        assert command.process.stdout is not None
        for line in command.process.stdout:
            kind, _, number = line.partition(" ")
            assert kind in seen, line
            seen[kind] = int(number)
            new_files += kind == "file"
            if seen["flushed"] >= epochs and new_files >= files:
                break
        else:
            assert command.process.stderr is not None
            pytest.fail(f"the writer ended: {command.process.stderr.read()}")
    finally:
        watchdog.cancel()
        machine.power_cut()
        command.process.kill()
        command.process.communicate()
    return seen["flushed"], seen["file"]
