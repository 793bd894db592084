"""Whether KVM really runs our kernel here; software emulation (TCG) otherwise.

A `/dev/kvm` that opens proves little: in nested machines it may refuse, hang or crash an ordinary kernel.
So one is booted, without a root file system: reaching the panic that says so is the proof. What is kept
true: the answer is remembered for this boot of the host and this kernel, and a doubt means TCG.
"""

import os
import subprocess
from pathlib import Path

from lab.host import say
from lab.kernel import Kernel
from lab.paths import cache_dir

QEMU = "qemu-system-x86_64"
TRIAL_S = 20.0
_PROOF = "Unable to mount root fs"


def kvm_works(kernel: Kernel) -> bool:
    """Whether this host runs `kernel` under KVM; tried once per boot of the host.

    `LAB_ACCEL=kvm` or `tcg` overrides.
    """
    forced = os.environ.get("LAB_ACCEL")
    if forced:
        return forced == "kvm"
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return False
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    memory = cache_dir() / f"kvm-{kernel.release}"
    if memory.is_file() and memory.read_text().split(":")[0] == boot_id:
        return memory.read_text().endswith("yes")
    works = _PROOF in _trial(kernel)
    say("using KVM" if works else "KVM does not run our kernel here: using software emulation")
    memory.write_text(f"{boot_id}:{'yes' if works else 'no'}")
    return works


def _trial(kernel: Kernel) -> str:
    """The console of a boot under KVM that cannot find a root file system."""
    argv = [
        *(QEMU, "-machine", "q35,accel=kvm", "-cpu", "max", "-m", "512M", "-nodefaults", "-no-reboot"),
        *("-display", "none", "-serial", "stdio", "-kernel", str(kernel.image)),
        *("-append", "console=ttyS0 panic=-1"),
    ]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=TRIAL_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        return (error.stdout or b"").decode(errors="replace")
    return done.stdout.decode(errors="replace")
