"""A real machine of each kind, seen from the host: one boot for all, again only after a test that destroys it."""

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from pathlib import Path

import pytest

from lab import machine as machine_module
from lab.errors import CommandFailed, CommandTimeout, GuestDied, GuestHung, GuestPanic
from lab.machine import Machine
from lab.paths import CHECKOUT, results_dir
from tests.lab.conftest import KINDS

VDUSE_MODULES = ("vduse", "virtio-vdpa", "vhost-vdpa")
OTHER_MODULES = ("ublk_drv", "nbd", "loop", "null_blk", "xfs", "btrfs")


def shell(machine: Machine, script: str, **options: object) -> str:
    return machine.run(["sh", "-c", script], **options).stdout  # type: ignore[arg-type]


def test_vduse_is_there(machine: Machine):
    machine.run(["modprobe", "-a", *VDUSE_MODULES])
    assert machine.run(["test", "-c", "/dev/vduse/control"]).returncode == 0


def test_modules_of_the_peers_load(machine: Machine):
    machine.run(["modprobe", "-a", *OTHER_MODULES])


@pytest.mark.parametrize("code", [0, 1, 77, 255])
def test_exit_codes_are_the_commands_own(machine: Machine, code: int):
    assert machine.run(["sh", "-c", f"exit {code}"], check=False).returncode == code


def test_failed_command_shows_its_output(machine: Machine):
    with pytest.raises(CommandFailed, match=r"ended with 3 in the guest:\s+why not"):
        shell(machine, "echo why not >&2; exit 3")


def test_output_and_input_are_kept_apart(machine: Machine):
    done = machine.run(["sh", "-c", "cat; echo err >&2"], input_text="one 'two' $three\n")
    assert (done.stdout, done.stderr) == ("one 'two' $three\n", "err\n")


def test_arguments_arrive_unchanged(machine: Machine):
    words = ["a b", "c'd", '"', "$HOME", "*", "", "ä\n!"]
    assert machine.run(["printf", "%s|", *words]).stdout == "".join(f"{word}|" for word in words)


def test_output_streams_while_the_command_runs(machine: Machine):
    command = machine.start(["sh", "-c", "echo early; read line; echo got $line"])
    assert command.process.stdout
    assert command.process.stdin
    assert command.process.stdout.readline() == "early\n"
    command.process.stdin.write("this\n")
    command.process.stdin.flush()
    assert command.process.stdout.readline() == "got this\n"
    assert command.process.wait(60) == 0
    command.kill()


def test_command_killed_for_its_time_takes_its_children_along(machine: Machine):
    started = time.monotonic()
    with pytest.raises(CommandTimeout, match="so far"):
        shell(machine, "setsid sleep 4711 & echo so far; sleep 4712", timeout_s=3)
    assert time.monotonic() - started < 60
    assert machine.run(["pgrep", "-f", "sleep 471[12]"], check=False).stdout == ""


def test_many_commands_run_at_once(machine: Machine):
    answers: list[str] = []
    threads = [
        threading.Thread(target=lambda n=n: answers.append(shell(machine, f"sleep 0.3; echo {n}")))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [f"{n}\n" for n in range(8)]


def test_checkout_is_live_and_cannot_be_changed(machine: Machine):
    name = f"live-{uuid.uuid4()}"
    live = CHECKOUT / ".cache" / name
    live.parent.mkdir(exist_ok=True)
    live.write_text("from the host")
    try:
        assert machine.run(["cat", str(live)]).stdout == "from the host"
        assert machine.run(["touch", str(CHECKOUT / "lab" / name)], check=False).returncode != 0
    finally:
        live.unlink()


def test_results_come_back_to_the_host(machine: Machine):
    name = f"result-{uuid.uuid4()}"
    shell(machine, f'echo from the guest > "$LAB_RESULTS/{name}"')
    result = results_dir() / name
    assert result.read_text() == "from the guest\n"
    result.unlink()


def test_host_is_not_changed_by_the_guest(machine: Machine):
    name = f"guest-{uuid.uuid4()}"
    for folder in ("/etc", "/usr/local", "/var", "/root", "/tmp", "/run", "/mnt"):
        shell(machine, f"touch {folder}/{name}")
        assert not os.path.lexists(f"{folder}/{name}")


def test_python_of_the_checkout_runs_in_the_guest(machine: Machine):
    script = "import os, lab, sys; print(sys.prefix, os.environ['LAB'], os.environ['HOME'])"
    assert machine.run(["python", "-c", script]).stdout.split() == [sys.prefix, "guest", "/root"]


def test_environment_is_passed_on_request(machine: Machine):
    assert shell(machine, 'echo "$COLOUR"', env={"COLOUR": "dark blue"}) == "dark blue\n"


def test_scratch_is_a_file_system_of_its_own(machine: Machine):
    assert shell(machine, "stat -f -c %T /mnt/scratch; stat -f -c %T /sys/fs/cgroup").split() == [
        "tmpfs",
        "cgroup2fs",
    ]


def test_orphans_leave_no_zombies(machine: Machine):
    script = "for i in 1 2 3; do (sleep 0.1 &); done; sleep 1; ps -eo stat= | grep -c Z"
    assert machine.run(["sh", "-c", script], check=False).stdout == "0\n"


def test_another_process_finds_the_machine(machine: Machine):
    command = [
        sys.executable,
        "-m",
        "lab",
        "exec",
        "--name",
        machine.name,
        "--",
        "sh",
        "-c",
        "uname -r; exit 6",
    ]
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 6, done.stderr
    assert done.stdout == shell(machine, "uname -r")


def test_panic_is_reported_with_the_kernels_last_words(machine: Machine):
    with pytest.raises(GuestPanic, match=r"(?s)sysrq triggered crash.*Call Trace"):
        shell(machine, "echo c > /proc/sysrq-trigger")
    with pytest.raises(GuestPanic):
        machine.run(["true"])


def test_machine_that_hangs_is_reported(machine: Machine, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(machine_module, "ANSWER_S", 2)
    assert machine._running
    os.kill(machine._running.process.pid, signal.SIGSTOP)
    try:
        with pytest.raises(GuestHung):
            machine.run(["true"], timeout_s=2)
    finally:
        os.kill(machine._running.process.pid, signal.SIGCONT)


@pytest.mark.parametrize("kind", KINDS)
def test_killed_machine_is_reported_and_its_disk_survives(kind: str):
    with Machine(kind=kind, disk_bytes=64 << 20, memory="1G", scratch_bytes=16 << 20) as machine:
        machine.run(["test", "-b", Machine.DISK])
        shell(machine, f"echo kept | dd of={Machine.DISK} conv=fsync status=none")
        assert machine._running
        os.kill(machine._running.process.pid, signal.SIGKILL)
        with pytest.raises(GuestDied):
            machine.run(["true"])
        machine.power_cut()
        machine.boot()
        assert shell(machine, f"head -n1 {Machine.DISK}") == "kept\n"
        folder = machine.folder
    assert not folder.exists()


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_left_of_a_machine_whose_laboratory_is_killed(kind: str):
    """SIGKILL, which nobody can tidy up after: the machine goes with who booted it."""
    script = "import sys, time; from lab.machine import Machine; m = Machine('orphan', kind=sys.argv[1]); m.boot()\n"
    script += "print(m._running.process.pid, flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", script, kind], cwd=CHECKOUT, stdout=subprocess.PIPE) as lab:
        assert lab.stdout
        pid = int(lab.stdout.readline())
        lab.kill()
    end = time.monotonic() + 30
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end
        time.sleep(0.05)
    again = Machine("orphan", kind=kind)  # nobody holds the name
    again._take_name()
    again._forget()
