"""Starts QEMU through virtme-ng: from the description of a machine to a running process.

What is kept true: everything that a start needs besides the machine's folder is in one short-lived folder
of sockets (their paths must be short), removed with the machine; QEMU inherits the machine's lock.
"""

import contextlib
import importlib.util
import os
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path

from lab import accel, virtiofsd
from lab import kernel as kernels
from lab.errors import LabSetupError
from lab.paths import CHECKOUT, GUEST_SCRIPTS
from lab.tap import open_tap
from lab.vmm import SSH_CARD, Boot

_PIDFILE = "qemu.pid"
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


class Qemu:
    """A machine that QEMU emulates, or runs with KVM; see lab.vmm.Vmm."""

    # Linux patches its code behind a breakpoint. An emulated CPU may run into the breakpoint of the other one when that
    # has already forgotten it, and the kernel dies (seen with QEMU 7.2, once in some hundred boots).
    passing = ("Could not set up host forwarding rule", "Oops: int3")

    def __init__(self, kernel: str | None = None) -> None:
        """Nothing happens before `start`. kernel: see `lab.kernel`."""
        self._choice = kernel
        self._port = 0

    def prepare(self) -> None:
        """Get the kernel and virtiofsd, and try KVM."""
        accel.kvm_works(kernels.obtain(self._choice))
        virtiofsd.obtain()

    def start(self, boot: Boot) -> subprocess.Popen[bytes]:
        """Start a machine through virtme-ng."""
        kernel, daemon = kernels.obtain(self._choice), virtiofsd.obtain()
        use_kvm = accel.kvm_works(kernel)
        if importlib.util.find_spec("virtme") is None:
            raise LabSetupError(
                f"{sys.executable} has no virtme-ng; `pip install -e .[dev]` in a virtual environment"
            )
        self._port = free_port()
        path = f"{daemon.parent}:{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
        with contextlib.ExitStack() as ours:
            taps = [] if boot.hardware.nic is None else [open_tap(boot.hardware.nic, offloads=True)]
            for tap in taps:
                ours.callback(os.close, tap)
            command = [sys.executable, "-m", "virtme.commands.run"]
            command += _options(boot, kernel, port=self._port, use_kvm=use_kvm, taps=taps)
            return boot.keep(command, env={"PATH": path, "TMPDIR": str(boot.sockets)}, pass_fds=taps)

    def pid(self, folder: Path) -> int:
        """QEMU's process."""
        return int((folder / _PIDFILE).read_text())

    def ssh(self, folder: Path) -> Mapping[str, str]:
        """Through a port on loopback."""
        del folder
        return {"HostName": "127.0.0.1", "Port": str(self._port)}


def free_port() -> int:
    """A TCP port on loopback that is free now; QEMU's start fails when somebody is faster."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _options(
    boot: Boot, kernel: kernels.Kernel, *, port: int, use_kvm: bool, taps: Iterable[int] = ()
) -> list[str]:
    """The arguments of virtme-run. taps: descriptors of the tap devices behind further cards."""
    folder, hardware = boot.folder, boot.hardware
    shared = dict.fromkeys((CHECKOUT, *boot.shared))  # live, not an overlay; the guest makes it read-only
    overlays = [d for d in _OVERLAYS if Path(d).is_dir() and not Path(d).is_symlink()]
    if any(path.is_relative_to(_TMP) for path in (CHECKOUT, folder, kernel.root, *shared)):
        overlays.append(str(_TMP))
    qemu = ["-pidfile", f"{folder}/{_PIDFILE}"]
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
        qemu += ["-drive", f"if=none,id=scratch,format=raw,discard=unmap,file={boot.disk}"]
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
