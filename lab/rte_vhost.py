"""Vhost-user servers on DPDK's rte_vhost, as SPDK's are: of disks, tests/vhost_user/rte_vhost.c; of networks, testpmd.

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
# What the disk's server needs; what testpmd needs to start, beside that.
_DPDK = "cryptodev dmadev eal ethdev hash kvargs mbuf mempool meter net pci rcu ring telemetry vhost"
_TESTPMD = (
    "bitratestats bpf bus-auxiliary bus-dpaa bus-pci bus-vdev cmdline common-dpaax common-iavf common-mlx5- "
    "crypto-scheduler eventdev gro gso ip-frag latencystats mempool-dpaa mempool-ring metrics net-bnxt net-bond "
    "net-dpaa net-i40e net-ice net-ixgbe net-mlx5- net-vhost pcapng pdump reorder sched security timer"
)
_PACKAGES = [
    "dpdk-dev",
    "libdpdk-dev",
    *(f"librte-{part}23" for part in (_DPDK + " " + _TESTPMD).split()),
    "ibverbs-providers",
    "libbsd0",
    "libelf1",
    "libfdt1",
    "libibverbs1",
    "libjansson4",
    "libmd0",
    "libnl-3-200",
    "libnl-route-3-200",
    "libnuma1",
    "libpcap0.8",
]
_LIBRARIES = "usr/lib/x86_64-linux-gnu"
_DRIVERS = "dpdk/pmds-23.0"
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


def testpmd(*sockets: Path) -> list[str]:
    """How to serve a network: a card for each of two sockets, frames of one going to the other; raises as `obtain`.

    One of its threads uses a whole processor.
    """
    root = obtain()
    libraries = root / _LIBRARIES
    drivers = libraries / _DRIVERS
    found = f"LD_LIBRARY_PATH={libraries}:{root / 'lib/x86_64-linux-gnu'}:{drivers}"
    argv = [
        "env",
        found,
        str(root / "usr/bin/dpdk-testpmd"),
        "--no-huge",
        "-m",
        "128",
        "--no-shconf",
        "--no-pci",
    ]
    argv += ["--no-telemetry", "-l", "0-1"]
    argv += [f"-d{drivers / name}" for name in ("librte_net_vhost.so.23", "librte_mempool_ring.so.23")]
    argv += [f"--vdev=net_vhost{number},iface={path}" for number, path in enumerate(sockets)]
    # Without a terminal it goes on as long as it has something to print now and then.
    return [*argv, "--", "--auto-start", "--nb-cores=1", "--total-num-mbufs=8192", "--stats-period=3600"]


def _build(root: Path) -> None:
    """Compile the program; what is needed at run time stays."""
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
