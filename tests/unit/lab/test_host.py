"""How the laboratory runs the host's own commands."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from lab.errors import LabSetupError
from lab.host import run
from tests.unit.processes import is_alive


def test_what_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    """A child that holds the output would be waited for otherwise."""
    script = f"sleep 600 & echo $! >{tmp_path}/pid; wait"
    with pytest.raises(LabSetupError, match="did not end within 0 s"):
        run(["sh", "-c", script], timeout_s=0.3)
    pid = int((tmp_path / "pid").read_text())
    deadline = time.monotonic() + 30
    while is_alive(pid):  # one that was killed is so until it has run once more
        assert time.monotonic() < deadline


def test_what_waits_for_others_may_take_too_long_more_than_once(tmp_path: Path) -> None:
    script = f"echo x >>{tmp_path}/tries; test $(wc -l <{tmp_path}/tries) = 3 || sleep 600; echo done"
    assert run(["sh", "-c", script], timeout_s=0.5, attempts=3) == "done\n"


def test_a_command_that_fails_is_not_tried_again(tmp_path: Path) -> None:
    with pytest.raises(LabSetupError, match="ended with 3"):
        run(["sh", "-c", f"echo x >>{tmp_path}/tries; exit 3"], timeout_s=60, attempts=3)
    assert (tmp_path / "tries").read_text() == "x\n"
