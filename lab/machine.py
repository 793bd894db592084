"""One virtual machine: boots once, runs many commands, can lose its power and boot again.

    with Machine() as machine:
        machine.run(["uname", "-r"]).stdout

How: `lab.qemu` or `lab.uml` (`LAB=uml`) starts a kernel with the host's root file system; `guest/init.sh` prepares
the guest and starts an SSH server; `lab.channel` runs commands through it. What is kept true:
- a machine's folder is locked as long as its process lives, which inherits the lock: names never clash,
  and a folder without a holder is rubbish;
- every wait has an end, and each way of failing has its error (`lab.errors`) with the kernel's last lines;
- the process that boots a machine need not stay (`detach`): another one finds it again (`Machine.find`). One
  that dies without saying so takes its machine with it (`lab.keeper`).
"""

import contextlib
import fcntl
import json
import os
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from lab import host as on_host
from lab import uml_kernel
from lab.channel import Channel, Command, Completed
from lab.errors import BootError, CommandTimeout, GuestDied, GuestHung, GuestPanic, LabError
from lab.paths import CHECKOUT, machines_dir, results_dir
from lab.qemu import Qemu
from lab.tap import Nic
from lab.uml import Uml
from lab.vmm import SSH_CARD, STOP_S, Boot, Hardware, Process, Vmm, end_keeper

GIB = 1 << 30
BOOT_S = 300.0
ANSWER_S = 120.0
"""How long a guest that is alive may take to run `true`: emulated, on a busy host."""

_READY = "lab: ready"


@dataclass(frozen=True)
class _Running:
    process: Process
    channel: Channel


def _wanted_kind() -> str:
    wanted = os.environ.get("LAB")
    return "uml" if wanted == "uml" or (wanted == "any" and uml_kernel.is_built()) else "qemu"


def _vmm(kind: str, kernel: str | None) -> Vmm:
    return Uml() if kind == "uml" else Qemu(kernel)


class Machine:
    """A virtual machine with a VDUSE kernel."""

    DISK = "/dev/disk/by-id/scsi-0lab_disk_scratch"

    def __init__(
        self,
        name: str | None = None,
        *,
        memory: str = "4G",
        cpus: int = 2,
        scratch_bytes: int = 2 * GIB,
        disk_bytes: int = 0,
        nic: Nic | None = None,
        kind: str | None = None,
        kernel: str | None = None,
    ) -> None:
        """Describe a machine; `boot` or the context manager starts it.

        name: None takes the first free of vm0, vm1, ...; memory: like `4G`; cpus: user-mode Linux has one;
        scratch_bytes: size of the tmpfs on /mnt/scratch; disk_bytes: size of a blank disk (`DISK`), that keeps its
        content over `power_cut`; nic: a second network card; kind: `qemu` or `uml`, default `$LAB`, where `any` is
        user-mode Linux if its kernel has been built, or `qemu`; kernel: QEMU's, see `lab.kernel`.
        """
        self.boot_s = 0.0
        self._name = name
        self._hardware = Hardware(memory, cpus, disk_bytes, scratch_bytes, nic)
        self._kind = kind or _wanted_kind()
        self._vmm = _vmm(self._kind, kernel)
        self._lock: int | None = None
        self._running: _Running | None = None

    @classmethod
    def find(cls, name: str, *, nic: Nic | None = None) -> "Machine":
        """The running machine of that name, booted by another process.

        nic: the second network card that it was booted with, which a boot after `power_cut` needs.
        Raises LabError when there is none.
        """
        machine = cls(name, nic=nic)
        if machine._try_lock(name):
            machine._unlock()
            raise LabError(f"no machine `{name}` is running; `python -m lab up --name {name}` starts one")
        try:
            state = json.loads((machine.folder / "state.json").read_text())
            found = Process(state["pid"])
        except (FileNotFoundError, ProcessLookupError) as error:
            raise LabError(f"the machine `{name}` is booting or going down; try again in a moment") from error
        machine._hardware = Hardware(**state["hardware"], nic=nic)
        machine._kind = state["kind"]
        machine._vmm = _vmm(machine._kind, None)
        machine._running = _Running(found, Channel(machine.folder / "ssh_config"))
        machine.boot_s = state["boot_s"]
        return machine

    @property
    def name(self) -> str:
        """The machine's name, known from the first boot on.

        Raises LabError before that, unless it was given.
        """
        if self._name is None:
            raise LabError("the machine has no name before it boots")
        return self._name

    @property
    def folder(self) -> Path:
        """The machine's own folder: keys, logs, disk."""
        return machines_dir() / self.name

    @property
    def console_log(self) -> Path:
        """The file with everything the guest's kernel printed, this boot and those before it."""
        return results_dir() / f"console-{self.name}.log"

    def console(self, lines: int = 40) -> str:
        """The last lines that the guest's kernel printed."""
        return on_host.tail(self.console_log, lines)

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

    def prepare(self) -> None:
        """Get what a boot needs into the cache, which can take minutes.

        Raises LabSetupError when something is missing on the host.
        """
        self._vmm.prepare()

    # -- life ----------------------------------------------------------------------------------------------

    def boot(self) -> None:
        """Start the machine and wait until it takes commands.

        Raises BootError when it does not come up, LabSetupError when something is missing on the host.
        """
        if self._running is not None:
            raise LabError(f"the machine `{self.name}` is up; stop it or cut its power first")
        self.prepare()
        started = time.monotonic()
        with contextlib.ExitStack() as undo:
            if self._lock is None:
                self._take_name()
                undo.callback(self._forget)
                self._clear_folder()
                self.console_log.unlink(missing_ok=True)
            self._fill_folder()
            self._running = self._boot_somehow(deadline=started + BOOT_S)
            undo.pop_all()
        self.boot_s = time.monotonic() - started
        hardware = {name: value for name, value in vars(self._hardware).items() if name != "nic"}
        pid = self._running.process.pid
        state = {"kind": self._kind, "pid": pid, "boot_s": self.boot_s, "hardware": hardware}
        (self.folder / "state.json").write_text(json.dumps(state))

    def power_cut(self) -> None:
        """Take the machine's power away: no sync, no goodbye. `boot` starts it again, its disk as it was."""
        if self._running is not None:
            self._running.channel.close()
            self._running.process.kill()
            self._running = None
            self._keep_name()

    def stop(self) -> None:
        """End the machine and remove its folder; the kernel's log stays. Nothing happens when it is down."""
        if self._name is None:
            return
        if self._running is not None and self._hardware.disk_bytes and not self._running.process.ended():
            with contextlib.suppress(LabError):
                self.run(["sync"], timeout_s=STOP_S)
        self.power_cut()
        self._unlock()
        self._keep_name()
        self._forget()

    def detach(self) -> None:
        """Leave the machine running for others to `find`; this object must not be used afterwards."""
        if self._running is not None:
            self._running.process.let_go()
            self._running = None
        self._unlock()

    # -- commands ------------------------------------------------------------------------------------------

    def run(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float = 600,
        check: bool = True,
        cwd: Path = CHECKOUT,
        env: Mapping[str, str] | None = None,
        input_text: str | None = None,
    ) -> Completed:
        """Run a command in the guest and return what it printed.

        timeout_s: seconds until it is killed with all its children; check: raise CommandFailed when its exit
        code is not 0; env: added to the usual environment (`lab.channel`).
        Raises CommandTimeout, GuestPanic, GuestDied, GuestHung.
        """
        command = self._usable().channel.start(argv, cwd=cwd, env=env, stdin=input_text is not None)
        completed = self._finish(command, timeout_s, input_text)
        if check:
            completed.check()
        return completed

    def stream(
        self,
        argv: Sequence[str],
        *,
        timeout_s: float | None = None,
        cwd: Path = CHECKOUT,
        env: Mapping[str, str] | None = None,
        terminal: bool = False,
    ) -> int:
        """Run a command in the guest on our own standard input, output and error; return its exit code.

        timeout_s: seconds until it is killed, None for never; terminal: give it a terminal.
        Raises CommandTimeout, GuestPanic, GuestDied, GuestHung.
        """
        channel = self._usable().channel
        command = channel.start(argv, cwd=cwd, env=env, inherit=True, terminal=terminal)
        return self._finish(command, timeout_s, None).returncode

    def start(
        self, argv: Sequence[str], *, cwd: Path = CHECKOUT, env: Mapping[str, str] | None = None
    ) -> Command:
        """Start a command in the background, on pipes; its `kill` ends it and its children."""
        return self._usable().channel.start(argv, cwd=cwd, env=env, stdin=True)

    def _finish(self, command: Command, timeout_s: float | None, input_text: str | None) -> Completed:
        words = shlex.join(command.argv)
        try:
            out, err = command.process.communicate(input_text, timeout=timeout_s)
        except subprocess.TimeoutExpired as expired:
            self._abort(command)
            printed = _text(expired.stdout) + _text(expired.stderr)
            said = f"; it had printed:\n{printed[-2000:]}" if printed else ""
            raise CommandTimeout(f"`{words}` was killed after {timeout_s:g} s{said}") from expired
        except BaseException:
            self._abort(command)
            raise
        code = command.process.returncode
        if code == Channel.LOST and not self._answers():
            raise self._diagnose(f"during `{words}`")
        return Completed(command.argv, code, out or "", err or "")

    def _abort(self, command: Command) -> None:
        if not command.kill(ANSWER_S) and not self._answers():
            raise self._diagnose(f"while `{shlex.join(command.argv)}`, which took too long, was being killed")

    def alive(self) -> bool:
        """Whether the machine is up and answers."""
        return self._running is not None and self._answers()

    # -- state ---------------------------------------------------------------------------------------------

    def _usable(self) -> _Running:
        if self._running is None:
            raise LabError("the machine is not booted")
        if self._running.process.ended():
            raise self._diagnose("before the command started")
        return self._running

    def _answers(self) -> bool:
        running = self._running
        return running is not None and not running.process.ended() and running.channel.answers(ANSWER_S)

    def _diagnose(self, when: str) -> LabError:
        ended = self._running is None or self._running.process.ended(wait_s=2)
        words = self.console(60)
        report = f"{when}; the log {self.console_log} ends:\n{words or '(nothing)'}"
        if not ended:
            return GuestHung(f"the guest stopped answering {report}")
        if "Kernel panic" in words:
            return GuestPanic(f"the guest's kernel panicked {report}")
        return GuestDied(f"the machine ended {report}")

    # -- booting -------------------------------------------------------------------------------------------

    def _boot_somehow(self, *, deadline: float) -> _Running:
        """Boot, again when it failed for a reason that passes: a port that is taken, an emulator that tripped."""
        for _ in range(2):
            try:
                return self._boot_once(deadline=deadline)
            except BootError:
                if not any(reason in self.console(200) for reason in self._vmm.passing):
                    raise
                on_host.say("the machine did not come up for a reason that passes; once more")
        return self._boot_once(deadline=deadline)

    def _boot_once(self, *, deadline: float) -> _Running:
        boot = Boot(
            folder=self.folder,
            sockets=Path(tempfile.mkdtemp(prefix="lab-")),
            hardware=self._hardware,
            shared=(results_dir(),),
            lock=self._lock if self._lock is not None else -1,
            console=self.console_log,
        )
        with contextlib.ExitStack() as undo:
            undo.callback(shutil.rmtree, boot.sockets, ignore_errors=True)
            keeper = self._vmm.start(boot)
            undo.callback(end_keeper, keeper)
            channel = Channel.create(self.folder, boot.sockets, self._vmm.ssh(self.folder))
            undo.callback(channel.close)
            try:
                self._wait_ready(keeper, deadline)
                channel.open(timeout_s=max(10.0, deadline - time.monotonic()))
            except LabError as error:
                said = on_host.tail(self.folder / "guest.out", 10)
                log = f"the log {self.console_log} ends:\n{self.console()}\n{said}"
                raise BootError(f"{error}; {log}") from error
            running = _Running(Process(self._vmm.pid(self.folder), keeper), channel)
            undo.pop_all()
            return running

    def _wait_ready(self, keeper: subprocess.Popen[bytes], deadline: float) -> None:
        while _READY not in on_host.tail(self.folder / "guest.out", 50):
            if keeper.poll() is not None:
                raise LabError("the machine ended while booting")
            if time.monotonic() > deadline:
                raise LabError(f"the machine was not ready within {BOOT_S:g} s")
            time.sleep(0.05)  # a file that another process writes: nothing better to wait on

    def _take_name(self) -> None:
        if self._name is not None:
            if not self._try_lock(self._name):
                raise LabError(f"a machine `{self._name}` is running; `python -m lab down` ends it")
            return
        for number in range(100):
            if self._try_lock(f"vm{number}"):
                self._name = f"vm{number}"
                return
        raise LabError(f"100 machines are running; their folders are in {machines_dir()}")

    def _try_lock(self, name: str) -> bool:
        file = os.open(machines_dir() / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(file)
            return False
        self._lock = file
        return True

    def _keep_name(self) -> None:
        """Take the lock when QEMU had it alone, as with a machine that another process booted."""
        deadline = time.monotonic() + STOP_S
        while self._lock is None and not self._try_lock(self.name):
            if time.monotonic() > deadline:  # virtme-ng's helpers may need a moment to go
                raise LabError(f"something of the machine `{self.name}` is left; see {self.folder}")
            time.sleep(0.02)

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _clear_folder(self) -> None:
        """Remove what an earlier machine of this name may have left; the lock must be ours."""
        Channel(self.folder / "ssh_config").close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _forget(self) -> None:
        """Give the name back; the lock must be ours."""
        self._clear_folder()
        self._unlock()

    def _fill_folder(self) -> None:
        folder = self.folder
        folder.mkdir(parents=True, exist_ok=True)
        for old in ("state.json", "guest.out", "qemu.pid", "uml.json"):
            (folder / old).unlink(missing_ok=True)
        for key in ("id", "host_key"):
            if not (folder / key).exists():
                argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", key, "-f", str(folder / key)]
                on_host.run(argv, timeout_s=60)
        settings = {
            "checkout": CHECKOUT,
            "scratch_bytes": self._hardware.scratch_bytes,
            "ssh_card": SSH_CARD,
        }
        lines = [f"{name}={shlex.quote(str(value))}\n" for name, value in settings.items()]
        (folder / "guest.conf").write_text("".join(lines))
        if self._hardware.disk_bytes and not (folder / "disk.img").exists():
            with (folder / "disk.img").open("wb") as disk:
                disk.truncate(self._hardware.disk_bytes)


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
