"""The switch of the bus is back on whatever happens, unless it was off before us."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from csi_vduse.errors import DeadlineExceeded
from csi_vduse.vdpa.autoprobe import Autoprobe


@pytest.fixture
def autoprobe(tmp_path: Path) -> Autoprobe:
    switch = tmp_path / "drivers_autoprobe"
    switch.write_text("1")
    return Autoprobe(switch, tmp_path / "marker", lock_timeout_s=0.2)


def test_it_is_off_inside_and_on_afterwards(autoprobe: Autoprobe):
    with autoprobe.off():
        assert autoprobe.switch.read_text() == "0"
    assert autoprobe.switch.read_text() == "1"
    assert not autoprobe.marker.exists()


def test_it_is_on_after_a_failure(autoprobe: Autoprobe):
    with pytest.raises(OSError, match="refused"), autoprobe.off():
        raise OSError("refused")
    assert autoprobe.switch.read_text() == "1"


def test_an_administrators_choice_stays(autoprobe: Autoprobe):
    autoprobe.switch.write_text("0")
    with autoprobe.off():
        pass
    assert autoprobe.recover() is False
    assert autoprobe.switch.read_text() == "0"


def test_the_next_one_mends_what_a_killed_process_left(autoprobe: Autoprobe):
    program = f"""
import os, signal
from pathlib import Path
from csi_vduse.vdpa.autoprobe import Autoprobe
with Autoprobe(Path({str(autoprobe.switch)!r}), Path({str(autoprobe.marker)!r})).off():
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert autoprobe.switch.read_text() == "0"
    assert autoprobe.recover() is True
    assert autoprobe.switch.read_text() == "1"
    assert not autoprobe.marker.exists()


def test_a_living_holder_is_waited_for_and_not_mended(autoprobe: Autoprobe):
    holder = os.open(autoprobe.switch, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    autoprobe.marker.touch()
    autoprobe.switch.write_text("0")
    with pytest.raises(DeadlineExceeded):
        autoprobe.recover()
    assert autoprobe.switch.read_text() == "0"
    os.close(holder)
    assert autoprobe.recover() is True
