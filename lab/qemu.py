"""Starts QEMU through virtme-ng: from the description of a machine to a running process.

What is kept true: everything that a start needs besides the machine's folder is in one short-lived folder
of sockets (their paths must be short), removed with the machine; QEMU inherits the machine's lock.
"""

import contextlib
import importlib.util
import os
import select
import shlex
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from lab.errors import LabError, LabSetupError
from lab.kernel import Kernel
from lab.paths import CHECKOUT, GUEST_SCRIPTS
from lab.tap import Nic, open_tap

STOP_S = 30.0
SSH_CARD = "52:54:00:12:34:56"
"""Hardware address of the card that the guest's SSH server is reached through; guest/init.sh looks for it."""

_OVERLAYS = ("/etc", "/home", "/mnt", "/opt", "/root", "/srv", "/usr", "/var")
_TMP = Path("/tmp")  # noqa: S108 -- the guest's, not ours

# Hardware that costs seconds of an emulated boot and that nobody here looks at.
_UNWANTED_MODULES = (
    "ahci",
    "kvm_amd",
    "kvm_intel",
    "acpi_cpufreq",
    "powernow_k8",
    "i6300esb",
    "pcspkr",
    "psmouse",
)

# Keepers that outlive us: a Popen that is forgotten while its process runs is a ResourceWarning.
_let_go: list[subprocess.Popen[bytes]] = []


@dataclass(frozen=True)
class Hardware:
    """What a machine is made of. Sizes in bytes; memory in QEMU's notation (`4G`); nic: a second network card."""

    memory: str
    cpus: int
    disk_bytes: int
    scratch_bytes: int
    nic: Nic | None = None


class Qemu:
    """A running QEMU: possibly our own child (below a keeper), possibly another process's."""

    def __init__(self, pid: int, keeper: subprocess.Popen[bytes] | None = None) -> None:
        """Watch the QEMU with this process id; `keeper` is its ancestor if it is ours."""
        self.pid = pid
        self._keeper = keeper
        self._end = os.pidfd_open(pid)

    def ended(self, wait_s: float = 0) -> bool:
        """Whether it has ended, waiting that long for it."""
        return bool(select.select([self._end], [], [], wait_s)[0])

    def kill(self) -> None:
        """End it at once, as a loss of power does; virtme-ng then tidies up. Useless from then on.

        Raises LabError when it does not die.
        """
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._end, signal.SIGKILL)
        if not self.ended(STOP_S):
            raise LabError(f"QEMU (process {self.pid}) does not die; is the host out of order?")
        if self._keeper is not None:
            end_keeper(self._keeper, wait_s=STOP_S)
        os.close(self._end)

    def let_go(self) -> None:
        """Tell the keeper that this machine stays when we go."""
        if self._keeper is not None and self._keeper.stdin is not None:
            self._keeper.stdin.write(b"k")
            self._keeper.stdin.close()
            _let_go.append(self._keeper)


def start(
    folder: Path,
    sockets: Path,
    hardware: Hardware,
    kernel: Kernel,
    *,
    port: int,
    use_kvm: bool,
    virtiofsd: Path,
    shared: Iterable[Path],
    lock: int,
    console: Path,
) -> subprocess.Popen[bytes]:
    """Start a machine; returns its keeper. The guest's start-up script prints to `guest.out` in the folder.

    port: TCP port on loopback that leads to the guest's SSH server; shared: folders that the guest may
    change; lock: file descriptor that QEMU keeps open; console: file that the kernel's log is added to.
    Raises LabSetupError when virtme-ng is missing.
    """
    if importlib.util.find_spec("virtme") is None:
        raise LabSetupError(
            f"{sys.executable} has no virtme-ng; `pip install -e .[dev]` in a virtual environment"
        )
    path = f"{virtiofsd.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    with contextlib.ExitStack() as ours:
        taps = [] if hardware.nic is None else [open_tap(hardware.nic)]
        for tap in taps:
            ours.callback(os.close, tap)
        command = [sys.executable, "-m", "virtme.commands.run"]
        command += _options(folder, hardware, kernel, port=port, use_kvm=use_kvm, shared=shared, taps=taps)
        out = ours.enter_context((folder / "guest.out").open("wb"))
        err = ours.enter_context(console.open("ab"))
        return subprocess.Popen(
            [sys.executable, "-m", "lab.keeper", *command],
            cwd=CHECKOUT,
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            env={**os.environ, "PATH": path, "TMPDIR": str(sockets)},
            pass_fds=[lock, *taps],
            start_new_session=True,
        )


def end_keeper(keeper: subprocess.Popen[bytes], wait_s: float = 0) -> None:
    """Wait for a keeper whose QEMU is gone, or kill it with all that it started."""
    try:
        keeper.wait(wait_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(keeper.pid, signal.SIGKILL)
        keeper.wait(STOP_S)
    if keeper.stdin is not None:
        keeper.stdin.close()


def free_port() -> int:
    """A TCP port on loopback that is free now; QEMU's start fails when somebody is faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _options(
    folder: Path,
    hardware: Hardware,
    kernel: Kernel,
    *,
    port: int,
    use_kvm: bool,
    shared: Iterable[Path],
    taps: Iterable[int] = (),
) -> list[str]:
    """The arguments of virtme-run. taps: descriptors of the tap devices behind further cards."""
    overlays = [d for d in _OVERLAYS if Path(d).is_dir() and not Path(d).is_symlink()]
    if any(path.is_relative_to(_TMP) for path in (CHECKOUT, folder, kernel.root, *shared)):
        overlays.append(str(_TMP))
    qemu = ["-pidfile", f"{folder}/qemu.pid"]
    qemu += ["-netdev", f"user,id=lab,hostfwd=tcp:127.0.0.1:{port}-:22"]
    qemu += ["-device", f"virtio-net-pci,netdev=lab,mac={SSH_CARD}"]
    for tap in taps:
        qemu += ["-netdev", f"tap,id=lan,fd={tap}"]
        qemu += ["-device", f"virtio-net-pci,netdev=lan,mac={hardware.nic.mac if hardware.nic else ''}"]
    if not use_kvm:
        # The emulator copies byte by byte where a processor says that `rep movsb` is fast.
        qemu += ["-cpu", "max,-erms"]
    if hardware.disk_bytes:
        qemu += ["-device", "virtio-scsi-pci,id=lab-scsi"]
        qemu += ["-drive", f"if=none,id=scratch,format=raw,discard=unmap,file={folder}/disk.img"]
        qemu += ["-device", "scsi-hd,bus=lab-scsi.0,drive=scratch,vendor=lab,product=disk,serial=scratch"]
    script = shlex.join([str(GUEST_SCRIPTS / "init.sh"), str(folder)])
    return [
        *(f"--kimg={kernel.image}", "--mods=auto", "--disable-microvm"),
        *(() if use_kvm else ("--disable-kvm",)),
        *(f"--memory={hardware.memory}", f"--cpus={hardware.cpus}", "--name=lab", "--cwd=/"),
        *("--show-boot-console", "--kopt=loglevel=6", "--kopt=oops=panic"),
        f"--kopt=modprobe.blacklist={','.join(_UNWANTED_MODULES)}",
        *(f"--overlay-rwdir={folder}" for folder in overlays),
        *(f"--rwdir={folder}" for folder in shared),
        *(f"--qemu-opt={option}" for option in qemu),
        f"--script-sh={script}",
    ]
