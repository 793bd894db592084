"""A user-mode Linux kernel with VDUSE, built from Debian's newest kernel source.

Debian's own (package `user-mode-linux`) has neither vDPA nor the bus that gives vDPA its DMA, so this one is whole:
pristine source, our configuration (`uml.config`). What is kept true: a kernel's folder in the cache is complete (it
appears by one rename) or absent, and it is named by what decides how it is built.
"""

import hashlib
import os
import re
import tempfile
import time
from pathlib import Path

from lab.archive import Release, unpack_kernel
from lab.errors import LabSetupError
from lab.host import run, say
from lab.kernel import Kernel, move_into_place, release_of
from lab.paths import CHECKOUT, cache_dir

_CONFIG = CHECKOUT / "lab" / "uml.config"
_SOURCE, _DEBIAN = "linux-source", Release("sid", security=False)
# Large, and nothing of it is built; their Kconfig files are read.
_UNUSED = (
    "drivers/gpu/*.[ch]",
    "drivers/net/ethernet/*.[ch]",
    "sound/*.[ch]",
    "*.dts",
    "*.dtsi",
    "tools/testing",
)
_RECIPE = 1  # one more when `_build` makes another kernel of the same configuration
_UNPACK_S, _BUILD_S = 600.0, 3600.0


def obtain() -> Kernel:
    """The kernel, built if it is not in the cache: some minutes.

    Raises LabSetupError when it cannot be had.
    """
    root = _root()
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".uml-", dir=root.parent) as work:
            _build(Path(work), Path(work, "root"))
            move_into_place(Path(work, "root"), root)
    return Kernel(release_of(root), root / "linux", root)


def is_built() -> bool:
    """Whether the kernel is in the cache."""
    return _root().is_dir()


def _root() -> Path:
    recipe = hashlib.sha256(_CONFIG.read_bytes() + bytes([_RECIPE])).hexdigest()
    return cache_dir() / "kernels" / f"uml-{recipe[:12]}"


def _build(work: Path, root: Path) -> None:
    started = time.monotonic()
    unpack_kernel(_SOURCE, _DEBIAN, work / "package", host_first=False)
    archive = next((work / "package/usr/src").glob("linux-source-*.tar.xz"))
    unused = [f"--exclude={archive.name.removesuffix('.tar.xz')}/{pattern}" for pattern in _UNUSED]
    run(["tar", "-C", str(work), *unused, "-xf", str(archive)], timeout_s=_UNPACK_S, env={"XZ_OPT": "-T0"})
    source = work / archive.name.removesuffix(".tar.xz")
    say(f"building {source.name} for user-mode Linux: some minutes, once")
    make = ["make", "-C", str(source), "ARCH=um", f"-j{os.cpu_count() or 1}", "-s"]
    run([*make, "alldefconfig"], timeout_s=_UNPACK_S, env={"KCONFIG_ALLCONFIG": str(_CONFIG)})
    _check(source / ".config")
    run([*make, "linux", "modules"], timeout_s=_BUILD_S)
    run([*make, "modules_install", f"INSTALL_MOD_PATH={root}", "INSTALL_MOD_STRIP=1"], timeout_s=_UNPACK_S)
    run(["strip", "-o", str(root / "linux"), str(source / "linux")], timeout_s=_UNPACK_S)
    say(f"built in {time.monotonic() - started:.0f} s")


def _check(config: Path) -> None:
    """Refuse a configuration that Kconfig did not take as it is: an option was renamed, or needs another one."""
    wanted = re.findall(r"^(?:CONFIG_\w+=.*|# CONFIG_\w+ is not set)$", _CONFIG.read_text(), re.MULTILINE)
    taken = set(config.read_text().splitlines())
    if missing := [line for line in wanted if line not in taken]:
        raise LabSetupError(f"{_CONFIG.name}: this kernel's Kconfig does not take {', '.join(missing)}")
