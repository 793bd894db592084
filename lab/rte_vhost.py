"""A vhost-user-blk server on DPDK's rte_vhost, which SPDK's vhost is built on: tests/vhost_user/rte_vhost.c, built.

Debian 12's DPDK is unpacked into the cache with the libraries that it needs; the C library is the host's, which has to be
as new. Not Debian 13's: DPDK 24.11.8 asks for a size of the file that memory comes from, and VDUSE's has none
(docs/vhost-user-backends.md). What is kept true: the folder in the cache is complete or absent, and named by what it
is made from; in a guest, where the cache cannot be written, nothing is downloaded.
"""

import hashlib
import os
import shutil
import tempfile
from pathlib import Path

from lab.archive import Release, unpack
from lab.errors import LabSetupError
from lab.host import run
from lab.paths import CHECKOUT, cache_dir

_SOURCE = CHECKOUT / "tests/vhost_user/rte_vhost.c"
_DEBIAN = Release("bookworm", security=True)
_DPDK = "cryptodev dmadev eal ethdev hash kvargs mbuf mempool meter net pci rcu ring telemetry vhost"
_PACKAGES = [
    "libdpdk-dev",
    *(f"librte-{part}23" for part in _DPDK.split()),
    "libbsd0",
    "libfdt1",
    "libmd0",
    "libnuma1",
]
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_HEADERS = ("usr/include/dpdk", "usr/include/x86_64-linux-gnu/dpdk")
_FLAGS = ("-std=gnu11", "-D_GNU_SOURCE", "-O2", "-g", "-Wall", "-Wextra", "-Werror", "-march=corei7")
_LINKED = ("-Wl,--allow-shlib-undefined", "-Wl,--disable-new-dtags", f"-Wl,-rpath,$ORIGIN/{_LIBRARIES}")
_BUILD_S = 120.0


def obtain() -> Path:
    """The folder that it is in, made if there is none.

    Raises LabSetupError when it cannot be had.
    """
    made_from = hashlib.sha256(_SOURCE.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:12]
    cached = cache_dir() / f"rte-vhost-{made_from}"
    if cached.is_dir():
        return cached
    if os.environ.get("LAB") == "guest":
        raise LabSetupError("no rte_vhost server in the cache: run `python -m lab prepare` on the host first")
    for old in cache_dir().glob("rte-vhost-*"):
        shutil.rmtree(old, ignore_errors=True)
    with tempfile.TemporaryDirectory(prefix=".rte-vhost-", dir=cache_dir()) as work:
        made = Path(work) / "root"
        unpack(_PACKAGES, _DEBIAN, made)
        _build(made)
        try:
            made.rename(cached)
        except OSError:
            if not cached.is_dir():  # another process may have been faster
                raise
    return cached


def command(socket: Path, image: Path, *, queues: int = 1) -> list[str]:
    """How to serve an image, as `obtain` raises; it prints the socket's path when that can be connected to."""
    return [str(obtain() / "rte_vhost"), str(socket), str(image), str(queues)]


def _build(root: Path) -> None:
    """Compile the program; what it needs at run time stays, the rest (most of DPDK's drivers) goes."""
    libraries = root / _LIBRARIES
    includes = [f"-I{root / folder}" for folder in _HEADERS]
    linked = [f"-L{libraries}", *_LINKED, "-lrte_vhost", "-lrte_eal"]
    run(
        ["gcc", *_FLAGS, *includes, "-o", str(root / "rte_vhost"), str(_SOURCE), *linked],
        timeout_s=_BUILD_S,
    )
    shutil.rmtree(root / "usr/include")
    for static in libraries.glob("*.a"):
        static.unlink()


if __name__ == "__main__":
    obtain()
