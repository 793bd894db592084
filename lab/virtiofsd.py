"""The Rust `virtiofsd`, which shows the host's file systems to the guest.

Order: one already on the host (Debian 13, Fedora and others package it), one in the cache, Debian 13's
package unpacked into the cache with the libraries that it needs (a few MB; an older host's C library is too
old for it), one built with cargo into the cache (some minutes). What is kept true: the folder in the cache
is complete or absent.
"""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from lab.archive import Release, unpack
from lab.errors import LabSetupError
from lab.host import run, say
from lab.paths import cache_dir

# Known to build with Rust 1.95 and to be understood by virtme-ng 1.42.
CARGO_VERSION = "1.14.0"
_BUILD_S = 1800.0
_DEBIAN = Release("trixie", security=True)
_DEBIAN_PACKAGES = ["virtiofsd", "libc6", "libgcc-s1", "libcap-ng0", "libseccomp2"]
_PACKAGED = ("/usr/libexec/virtiofsd", "/usr/lib/virtiofsd/virtiofsd", "/usr/lib/qemu/virtiofsd")

# Runs the unpacked program with the C library and the loader of its own release.
_WRAPPER = """\
#!/bin/sh
root=$(dirname "$(dirname "$(readlink -f "$0")")")/root
libraries=$root/usr/lib/x86_64-linux-gnu
exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$root/usr/libexec/virtiofsd" "$@"
"""


def obtain() -> Path:
    """The path of a usable virtiofsd, downloaded or built if there is none.

    Raises LabSetupError when it cannot be had.
    """
    cached = cache_dir() / "virtiofsd" / "bin" / "virtiofsd"
    for path in (shutil.which("virtiofsd"), *_PACKAGED, str(cached)):
        if path and _works(path):
            return Path(path)
    shutil.rmtree(cached.parent.parent, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".virtiofsd-", dir=cache_dir()) as work:
        made = Path(work) / "made"
        try:
            _unpack_debian(made)
        except LabSetupError as error:
            if not shutil.which("cargo"):
                raise
            say(f"{error}; building virtiofsd instead")
            _build(made)
        try:
            made.rename(cached.parent.parent)
        except OSError:
            if not cached.is_file():  # another process may have been faster
                raise
    return cached


def _works(path: str) -> bool:
    """Whether it is the Rust one: QEMU's old C implementation knows other options."""
    if not os.access(path, os.X_OK):
        return False
    done = subprocess.run([path, "--help"], capture_output=True, text=True, timeout=30, check=False)
    return done.returncode == 0 and "--sandbox" in done.stdout and "--announce-submounts" in done.stdout


def _unpack_debian(target: Path) -> None:
    unpack(_DEBIAN_PACKAGES, _DEBIAN, target / "root")
    wrapper = target / "bin" / "virtiofsd"
    wrapper.parent.mkdir()
    wrapper.write_text(_WRAPPER)
    wrapper.chmod(0o755)
    if not _works(str(wrapper)):
        raise LabSetupError(f"the virtiofsd of Debian {_DEBIAN.name} does not run here")


def _build(target: Path) -> None:
    """Build it; the libraries' headers come from lab/install-deps.sh."""
    version = ["--version", CARGO_VERSION, "--locked"]
    environment = {"CARGO_TARGET_DIR": f"{target}.build"}
    argv = ["cargo", "install", "virtiofsd", *version, "--root", str(target)]
    run(argv, timeout_s=_BUILD_S, env=environment)
