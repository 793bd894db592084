"""What runs a machine: QEMU (lab.qemu) or user-mode Linux (lab.uml), and how `lab.machine` sees either.

What is kept true: a machine is one process below a keeper (lab.keeper); when that process is killed, all of the machine
is gone at once, as without power; it keeps the machine's lock as long as it lives.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lab.errors import LabError
from lab.paths import CHECKOUT
from lab.tap import Nic

STOP_S = 30.0
SSH_CARD = "52:54:00:12:34:56"
"""Hardware address of the card that the guest's SSH server is reached through; guest/init.sh looks for it."""

# Keepers that outlive us: a Popen that is forgotten while its process runs is a ResourceWarning.
_let_go: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of. Sizes in bytes; memory like `4G`; nic: a second network card."""

    memory: str
    cpus: int
    disk_bytes: int
    scratch_bytes: int
    nic: Nic | None = None


@dataclass(frozen=True)
class Boot:
    """One start of a machine.

    Args:
        folder: the machine's own; the guest's start-up script prints to `guest.out` in it.
        sockets: a folder for sockets, whose paths have to be short; goes with the machine.
        hardware: what it is made of.
        shared: folders that the guest may change.
        lock: file descriptor that the machine's process keeps open.
        console: file that the kernel's log is added to.
    """

    folder: Path
    sockets: Path
    hardware: Hardware
    shared: tuple[Path, ...]
    lock: int
    console: Path

    @property
    def disk(self) -> Path:
        """The file behind the disk, if the hardware has one."""
        return self.folder / "disk.img"

    def keep(
        self, command: Sequence[str], *, env: Mapping[str, str] | None = None, pass_fds: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start the command that is the machine, below a keeper, which is returned."""
        with (self.folder / "guest.out").open("wb") as out, self.console.open("ab") as err:
            return subprocess.Popen(
                [sys.executable, "-m", "lab.keeper", *command],
                cwd=CHECKOUT,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                env={**os.environ, **(env or {})},
                pass_fds=[self.lock, *pass_fds],
                start_new_session=True,
            )


class Vmm(Protocol):
    """A kind of machine."""

    @property
    def passing(self) -> tuple[str, ...]:
        """What the console says when a boot failed for a reason that passes."""

    def prepare(self) -> None:
        """Get what a start needs into the cache, which can take minutes.

        Raises LabSetupError when something is missing on the host.
        """

    def start(self, boot: Boot) -> subprocess.Popen[bytes]:
        """Start a machine; returns its keeper. Raises LabSetupError as `prepare`."""

    def pid(self, folder: Path) -> int:
        """The process whose death is the machine's, once the guest is ready."""

    def ssh(self, folder: Path) -> Mapping[str, str]:
        """How OpenSSH's client reaches the guest's server: options of ssh_config."""


class Process:
    """A running machine: possibly our own child (below a keeper), possibly another process's."""

    def __init__(self, pid: int, keeper: subprocess.Popen[bytes] | None = None) -> None:
        """Watch the machine with this process id; `keeper` is its ancestor if it is ours."""
        self.pid = pid
        self._keeper = keeper
        self._end = os.pidfd_open(pid)

    def ended(self, wait_s: float = 0) -> bool:
        """Whether it has ended, waiting that long for it."""
        return bool(select.select([self._end], [], [], wait_s)[0])

    def kill(self) -> None:
        """End it at once, as a loss of power does; useless from then on.

        Raises LabError when it does not die.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._end, signal.SIGKILL)
        if not self.ended(STOP_S):
            raise LabError(f"the machine's process {self.pid} does not die; is the host out of order?")
        if self._keeper is not None:
            end_keeper(self._keeper, wait_s=STOP_S)
        os.close(self._end)

    def let_go(self) -> None:
        """Tell the keeper that this machine stays when we go."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.write(b"k")
            self._keeper.stdin.close()
            _let_go.append(self._keeper)


def end_keeper(keeper: subprocess.Popen[bytes], wait_s: float = 0) -> None:
    """Wait for a keeper whose machine is gone, or kill it with all that it started."""
    try:
        keeper.wait(wait_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait(STOP_S)
    if keeper.stdin is not None:
        keeper.stdin.close()
