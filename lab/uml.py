"""User-mode Linux as a machine: a kernel that is a process of the host, in which programs run at native speed.

What is kept true (bubblewrap sees to it): the machine has mount, process and network namespaces of its own; the host's
file system is read-only but for the shared folders and its disk; when its first process or its keeper dies, all of it is
gone. The guest's root is the host's, under an overlay in memory (guest/uml.sh).
What it does not test: processors in parallel, and Debian's own kernel; see docs/lab.md.
"""

import contextlib
import json
import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from pathlib import Path

from lab import uml_kernel
from lab.errors import LabSetupError
from lab.kernel import Kernel
from lab.paths import GUEST_SCRIPTS
from lab.tap import open_tap
from lab.vmm import SSH_CARD, Boot

_INFO = "uml.json"
_GUEST, _HOST = "10.0.2.15", "10.0.2.2/24"  # guest/init.sh has them too
# In its namespace, before the kernel: the other end of its network card.
_LAUNCH = (
    f'ip tuntap add tap0 mode tap && ip address add {_HOST} dev tap0 && ip link set tap0 up && exec "$@"'
)


class Uml:
    """A machine of user-mode Linux; see lab.vmm.Vmm."""

    passing: tuple[str, ...] = ()

    def prepare(self) -> None:
        """Build the kernel if there is none."""
        uml_kernel.obtain()

    def start(self, boot: Boot) -> subprocess.Popen[bytes]:
        """Start a machine below bubblewrap."""
        kernel = uml_kernel.obtain()
        if shutil.which("bwrap") is None:
            raise LabSetupError("bubblewrap is missing: run lab/install-deps.sh")
        own = [*boot.shared, *([boot.disk] if boot.hardware.disk_bytes else [])]
        with contextlib.ExitStack() as ours:
            info = ours.enter_context((boot.folder / _INFO).open("wb"))
            taps = [] if boot.hardware.nic is None else [open_tap(boot.hardware.nic, offloads=False)]
            for tap in taps:
                ours.callback(os.close, tap)
            command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--die-with-parent"]
            command += ["--cap-add", "CAP_NET_ADMIN", "--info-fd", str(info.fileno())]
            command += ["--ro-bind", "/", "/", "--proc", "/proc", "--dev", "/dev", "--tmpfs", "/run"]
            command += ["--dev-bind", "/dev/net/tun", "/dev/net/tun"]
            command += [word for path in own for word in ("--bind", str(path), str(path))]
            command += ["sh", "-c", _LAUNCH, "sh", *_options(boot, kernel, taps)]
            return boot.keep(command, pass_fds=[info.fileno(), *taps])

    def pid(self, folder: Path) -> int:
        """The kernel's process: the child of the first process of its namespace."""
        first = json.loads((folder / _INFO).read_text())["child-pid"]
        return int(Path(f"/proc/{first}/task/{first}/children").read_text())

    def ssh(self, folder: Path) -> Mapping[str, str]:
        """From within its namespaces: a connection that outlived the machine would be waited for."""
        find = f"sed -n 's/.*\"child-pid\": *\\([0-9]*\\).*/\\1/p' {folder / _INFO}"
        return {"ProxyCommand": f"nsenter --target $({find}) --net --pid busybox nc {_GUEST} 22"}


def _options(boot: Boot, kernel: Kernel, taps: Iterable[int]) -> list[str]:
    """The kernel's command line, itself first. taps: descriptors of the tap devices behind further cards."""
    disk = [f"ubd0={boot.disk}"] if boot.hardware.disk_bytes else []
    mac = boot.hardware.nic.mac if boot.hardware.nic else ""
    cards = [f"vec{number}:transport=fd,fd={tap},vec=0,mac={mac}" for number, tap in enumerate(taps, 1)]
    return [
        *(str(kernel.image), f"mem={boot.hardware.memory}", "seccomp=on", "uml_dir=/run/uml"),
        *("rootfstype=hostfs", "rootflags=/", "ro", *disk),
        f"vec0:transport=tap,ifname=tap0,mac={SSH_CARD}",
        *cards,
        # The kernel's log is our error, and the start-up script's words our output.
        *("con=null", "con0=null,fd:2", "con1=null,fd:1", "ssl=null", "loglevel=6", "oops=panic"),
        *(f"init={GUEST_SCRIPTS / 'uml.sh'}", f"lab_machine={boot.folder}"),
        f"lab_modules={kernel.root / 'lib/modules'}",
        f"lab_shared={os.pathsep.join(map(str, boot.shared))}",
    ]
