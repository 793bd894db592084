"""A host that has VDUSE itself, seen as a machine: the same suites run on it directly (`LAB=host`).

Also what a guest is to itself (`LAB=guest`): `python -m lab run` inside one just runs. What is kept true: the
same methods and errors as `lab.machine.Machine`, as far as they make sense without a virtual machine.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from lab.channel import Completed, environment
from lab.errors import CommandTimeout, LabSetupError
from lab.host import run as run_on_host
from lab.paths import CHECKOUT, results_dir

MODULES = ("vduse", "virtio-vdpa", "vhost-vdpa")


class LocalMachine:
    """This very host."""

    name = "host"

    def __init__(self) -> None:
        """Nothing happens before `boot`."""
        self.boot_s = 0.0

    @property
    def console_log(self) -> Path:
        """The file that `stop` writes the kernel's log to."""
        return results_dir() / "console-host.log"

    def console(self, lines: int = 40) -> str:
        """The last lines of the kernel's log."""
        return "\n".join(run_on_host(["dmesg"], timeout_s=30).splitlines()[-lines:])

    def boot(self) -> None:
        """Load the modules.

        Raises LabSetupError when the kernel has no VDUSE or we may not use it.
        """
        started = time.monotonic()
        run_on_host(["modprobe", "-a", *MODULES], timeout_s=60)
        if not os.access("/dev/vduse/control", os.R_OK | os.W_OK):
            raise LabSetupError(
                "LAB=host, but /dev/vduse/control cannot be opened: root on a VDUSE kernel is needed"
            )
        self.boot_s = time.monotonic() - started

    def stop(self) -> None:
        """Keep the kernel's log; the host stays as it is."""
        with contextlib.suppress(LabSetupError):
            self.console_log.write_text(run_on_host(["dmesg"], timeout_s=30))

    def __enter__(self) -> Self:
        self.boot()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        self.stop()

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
        """As `Machine.run`."""
        process = self._start(argv, cwd, env, subprocess.PIPE)
        out, err = _communicate(process, argv, timeout_s, input_text or "")
        completed = Completed(tuple(argv), process.returncode, out, err)
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
        """As `Machine.stream`; the command has our terminal when we have one."""
        if terminal:
            try:
                return subprocess.call(argv, cwd=cwd, env=environment(env), timeout=timeout_s)
            except subprocess.TimeoutExpired as error:
                raise _killed(argv, timeout_s) from error
        process = self._start(argv, cwd, env, None)
        _communicate(process, argv, timeout_s, None)
        return process.returncode

    @staticmethod
    def _start(
        argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None, pipes: int | None
    ) -> subprocess.Popen[str]:
        return subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment(env),
            stdin=pipes,
            stdout=pipes,
            stderr=pipes,
            text=True,
            errors="replace",
            start_new_session=True,
        )


def _communicate(
    process: subprocess.Popen[str], argv: Sequence[str], timeout_s: float | None, text: str | None
) -> tuple[str, str]:
    try:
        out, err = process.communicate(text, timeout=timeout_s)
    except BaseException as error:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            raise _killed(argv, timeout_s) from error
        raise
    return out or "", err or ""


def _killed(argv: Sequence[str], timeout_s: float | None) -> CommandTimeout:
    # What was asked for: subprocess tells what was left of it when it began its last wait.
    return CommandTimeout(f"`{shlex.join(argv)}` was killed after {timeout_s} s")
