"""A VM that is not the lab's: QEMU without acceleration, a Debian kernel, and an initramfs that the test makes.

The guest's only disk is the vhost-user one. Its init runs a shell script of the test and prints what that says to
the serial console; nothing of the host's system is visible to it. No root rights are needed.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import time
from pathlib import Path

from lab.kernel import Kernel

QEMU = "qemu-system-x86_64"
BOOT_TIMEOUT_S = 240
_INIT = """#!/bin/sh
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs tmp /tmp
for module in virtio_blk; do insmod /modules/$module.ko || echo "GUEST: no $module"; done
export PATH=/bin:/sbin
D=/dev/vda
[ -b $D ] || echo "GUEST: no disk"
(set -e; . /script) && echo "GUEST: DONE" || echo "GUEST: FAILED"
sync
poweroff -f
"""


def make_initramfs(target: Path, kernel: Kernel, script: str) -> Path:
    """Busybox, mkfs.ext4 with its libraries, the modules, and what the guest has to do; an archive for -initrd."""
    root = target.with_suffix(".d")
    for folder in ("bin", "sbin", "proc", "sys", "dev", "tmp", "mnt", "etc", "modules"):
        (root / folder).mkdir(parents=True)
    busybox = shutil.which("busybox") or "/usr/bin/busybox"
    shutil.copy(busybox, root / "bin/busybox")
    for applet in subprocess.run(
        [busybox, "--list"], capture_output=True, text=True, check=True, timeout=30
    ).stdout.split():
        if applet != "busybox":
            (root / "bin" / applet).symlink_to("busybox")
    _copy_program(Path(shutil.which("mkfs.ext4", path="/usr/sbin:/sbin") or "/sbin/mkfs.ext4"), root)
    (root / "etc/mtab").symlink_to("/proc/mounts")
    for module in (kernel.root / "lib/modules" / kernel.release).rglob("virtio_blk.ko"):
        shutil.copy(module, root / "modules")
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    (root / "script").write_text(script)
    names = "\n".join(str(p.relative_to(root)) for p in sorted(root.rglob("*")))
    with target.open("wb") as out:
        subprocess.run(
            [busybox, "cpio", "-o", "-H", "newc"],
            cwd=root,
            input=names.encode(),
            stdout=out,
            stderr=subprocess.PIPE,
            check=True,
            timeout=60,
        )
    return target


def _copy_program(program: Path, root: Path) -> None:
    text = subprocess.run(
        ["ldd", str(program)], capture_output=True, text=True, check=True, timeout=30
    ).stdout
    for library in re.findall(r"(/\S+)", text):
        target = root / library.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(library, target)
    shutil.copy(program.resolve(), root / "sbin" / program.name)


class Guest:
    """A VM with one vhost-user disk; ``console`` is what it has printed."""

    def __init__(
        self,
        folder: Path,
        kernel: Kernel,
        socket: Path,
        script: str,
        *,
        queues: int = 1,
        packed: bool = False,
        reconnect: bool = False,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self._console = folder / "console"
        self._errors = folder / "qemu.log"
        initramfs = make_initramfs(folder / "initramfs", kernel, script)
        chardev = f"socket,id=disk,path={socket}" + (",reconnect=1" if reconnect else "")
        device = f"vhost-user-blk-pci,chardev=disk,num-queues={queues},packed={'on' if packed else 'off'}"
        argv = [
            *(QEMU, "-machine", "q35,memory-backend=ram", "-smp", str(queues), "-m", "256M"),
            # Processors that take turns: with a thread for each, the emulator can run an instruction that the
            # guest's kernel has just patched on another one (seen: int3 of a static branch, a panic).
            *("-accel", "tcg,thread=single"),
            *("-object", "memory-backend-memfd,id=ram,size=256M,share=on"),
            *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
            *("-chardev", chardev, "-device", f"{device},disable-legacy=on"),
            *("-chardev", f"file,id=console,path={self._console}", "-serial", "chardev:console"),
            *("-kernel", str(kernel.image), "-initrd", str(initramfs)),
            *("-append", "console=ttyS0 quiet panic=-1 tsc=unstable"),
        ]
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors)

    @property
    def console(self) -> str:
        text = self._console.read_text(errors="replace") if self._console.exists() else ""
        return text + self._errors.read_text(errors="replace")

    def wait_for(self, text: str, timeout_s: float = BOOT_TIMEOUT_S) -> None:
        deadline = time.monotonic() + timeout_s
        while text not in self.console:
            assert self._process.poll() is None, f"QEMU ended without {text!r}:\n{self.console}"
            assert time.monotonic() < deadline, f"no {text!r} in:\n{self.console}"
            time.sleep(0.1)

    def wait_until_done(self, timeout_s: float = BOOT_TIMEOUT_S) -> str:
        """Wait for the end of the script and of QEMU; returns the console."""
        self._process.wait(timeout_s)
        assert "GUEST: DONE" in self.console, self.console
        return self.console

    def kill(self) -> None:
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait(30)
