"""What the laboratory does on the host, without booting anything."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lab import __main__ as command_line
from lab.errors import BootError, LabError, LabSetupError
from lab.host import run, tail
from lab.kernel import obtain
from lab.local import LocalMachine
from lab.machine import Machine
from lab.paths import CHECKOUT
from lab.precompile import named_tests


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CSI_VDUSE_CACHE", str(tmp_path))
    return tmp_path


def test_keeper_kills_the_command_when_the_laboratory_goes_away():
    marker = f"10{os.getpid()}"
    keeper = subprocess.Popen(
        [sys.executable, "-m", "lab.keeper", "sh", "-c", f"echo up; sleep {marker}"],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    with keeper:
        assert keeper.stdin
        assert keeper.stdout
        assert keeper.stdout.readline() == b"up\n"
        keeper.stdin.close()
        assert keeper.wait(20) == -signal.SIGKILL
        assert keeper.stdout.read() == b""  # the pipe ends: none of the children is left


def test_keeper_lets_the_command_live_when_told_so():
    keeper = subprocess.Popen(
        [sys.executable, "-m", "lab.keeper", "sh", "-c", "sleep 1; exit 7"],
        cwd=CHECKOUT,
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    keeper.communicate(b"k")
    assert keeper.wait(20) == 7


def test_finding_a_machine_that_does_not_run_says_how_to_start_it(cache: Path):
    with pytest.raises(LabError, match="python -m lab up --name nobody"):
        Machine.find("nobody")


def test_a_name_is_given_only_once(cache: Path):
    first, second = Machine("twin"), Machine("twin")
    first._take_name()
    with pytest.raises(LabError, match="`twin` is running"):
        second._take_name()
    first._unlock()
    second._take_name()
    second._unlock()


def test_unnamed_machines_take_different_names(cache: Path):
    first, second = Machine(), Machine()
    first._take_name()
    second._take_name()
    assert (first.name, second.name) == ("vm0", "vm1")
    first._unlock()
    second._unlock()


def test_unknown_kernel_is_refused(cache: Path):
    with pytest.raises(LabSetupError, match=r"LAB_KERNEL=5\.4"):
        obtain("5.4")


def test_failed_host_command_shows_what_it_said():
    with pytest.raises(LabSetupError, match=r"ended with 3:\s+no such luck"):
        run(["sh", "-c", "echo no such luck; exit 3"], timeout_s=20)


def test_missing_host_tool_names_the_install_script():
    with pytest.raises(LabSetupError, match="install-deps"):
        run(["no-such-tool"], timeout_s=20)


def test_tail_keeps_the_end_and_drops_control_characters(tmp_path: Path):
    log = tmp_path / "log"
    log.write_bytes(b"one\r\n\x1b[31mtwo\nthree\n")
    assert tail(log, 2) == "[31mtwo\nthree"
    assert tail(tmp_path / "missing", 2) == ""


def test_pytest_command_lines_are_recognized_for_precompilation():
    command = [
        ".venv/bin/python",
        "-m",
        "pytest",
        "-x",
        "tests/lab/test_host_side.py::test_x",
        "tests/nothing",
    ]
    assert named_tests(command) == ["tests/lab/test_host_side.py"]
    assert named_tests(["ls", "tests/lab"]) == []


def test_local_machine_kills_a_command_after_its_time(cache: Path, capfd: pytest.CaptureFixture[str]):
    started = time.monotonic()
    code = command_line.TIMED_OUT
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAB", "guest")
        assert command_line.main(["exec", "--timeout", "0.5", "--", "sleep", "60"]) == code
    assert time.monotonic() - started < 30
    assert "was killed after 0.5 s" in capfd.readouterr().err


def test_local_machine_has_true_exit_codes_and_output():
    done = LocalMachine().run(["sh", "-c", "cat; echo err >&2; exit 4"], input_text="in\n", check=False)
    assert (done.returncode, done.stdout, done.stderr) == (4, "in\n", "err\n")


def test_machine_that_cannot_boot_leaves_nothing_behind(cache: Path, monkeypatch: pytest.MonkeyPatch):
    sockets = cache / "sockets"
    sockets.mkdir()
    image = cache / "tree" / "boot" / "vmlinuz-0"
    image.parent.mkdir(parents=True)
    image.write_bytes(b"no kernel")
    (cache / "tree" / "lib" / "modules" / "0").mkdir(parents=True)
    daemon = cache / "virtiofsd"
    monkeypatch.setattr("tempfile.tempdir", str(sockets))
    monkeypatch.setattr("lab.virtiofsd.obtain", lambda: daemon)
    monkeypatch.setenv("LAB_ACCEL", "tcg")
    machine = Machine("broken", kind="qemu", kernel=str(image))
    with pytest.raises(BootError, match="ended while booting"):
        machine.boot()
    assert list(sockets.iterdir()) == []
    assert not machine.folder.exists()
    assert machine._try_lock("broken")
    machine._unlock()
