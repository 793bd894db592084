"""What the driver needs of a host, checked: kernel, modules, devices, tools, limits, pools.

Observing and judging are apart: `judge_kernel` and the like are pure. A finding that is "bad" keeps the
driver from working; a "warning" does not, yet.
"""

from __future__ import annotations

import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from csi_vduse.config import PoolConfig
from csi_vduse.dataplane.engine import uring_problem
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.errors import VduseError

MODULES = ("vduse", "vdpa", "virtio_vdpa", "vhost_vdpa")
TOOLS = {
    "mount": "util-linux",
    "blkid": "util-linux",
    "mkfs.ext4": "e2fsprogs",
    "resize2fs": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "xfs_growfs": "xfsprogs",
    "mkfs.btrfs": "btrfs-progs",
}
MIN_OPEN_FILES = 4096
MIN_POOL_FREE = 0.05
# CVE-2026-74313, use after free between open and destroy of a device: first fixed release of each series.
_FIXED = {(6, 1): 178, (6, 6): 145, (6, 12): 97, (6, 18): 40, (7, 1): 5}
_FIRST_FIXED_SERIES = (7, 2)
_FIRST_SERIES = (5, 15)


@dataclass(frozen=True)
class Finding:
    """One check: what was seen, and what to do if it is not good."""

    check: str
    verdict: Literal["good", "warning", "bad"]
    seen: str
    remedy: str = ""


def examine(pools: tuple[PoolConfig, ...], servers: tuple[Path, ...] = ()) -> list[Finding]:
    """Look at this host, and at vhost-user servers that are to serve its volumes."""
    findings = [judge_kernel(os.uname().release)]
    findings += [_module(name) for name in MODULES]
    findings += [_device(Path("/dev/vduse/control"), "modprobe vduse; in a container, mount /dev")]
    findings += [_privilege(), judge_uring(uring_problem())]
    findings += [_tool(name, package) for name, package in TOOLS.items()]
    findings += [judge_open_files(resource.getrlimit(resource.RLIMIT_NOFILE)[1])]
    findings += [_pool(pool) if pool.kind == "file" else _server_of(pool) for pool in pools]
    return findings + [_disk(socket) for socket in servers]


def judge_kernel(release: str) -> Finding:
    """Judge a kernel release such as 6.12.117+deb12-cloud-amd64."""
    match = re.match(r"(\d+)\.(\d+)(?:\.(\d+))?", release)
    if not match:
        return Finding("kernel", "warning", release, "the version cannot be read; VDUSE needs 5.15 or newer")
    series, patch = (int(match[1]), int(match[2])), int(match[3] or 0)
    if series < _FIRST_SERIES:
        return Finding("kernel", "bad", release, "VDUSE needs 5.15 or newer")
    if series < _FIRST_FIXED_SERIES and patch < _FIXED.get(series, 1 << 30):
        return Finding(
            "kernel",
            "warning",
            release,
            "it may have CVE-2026-74313 (use after free in VDUSE): update to 6.1.178, 6.6.145, 6.12.97, "
            "6.18.40, 7.1.5 or newer of their series, unless your distribution says that it is fixed",
        )
    return Finding("kernel", "good", release)


def judge_uring(problem: str) -> Finding:
    """Judge what the engine says of io_uring here; in the agent's container it may be otherwise than on the host."""
    return (
        Finding("io_uring", "bad", "refused", problem) if problem else Finding("io_uring", "good", "allowed")
    )


def judge_open_files(limit: int) -> Finding:
    """Judge the hard limit of open files: a volume takes a dozen in its worker, the agent two for each."""
    if limit != resource.RLIM_INFINITY and limit < MIN_OPEN_FILES:
        return Finding(
            "open files", "warning", str(limit), f"raise the limit to {MIN_OPEN_FILES} (LimitNOFILE)"
        )
    return Finding("open files", "good", "unlimited" if limit == resource.RLIM_INFINITY else str(limit))


def _module(name: str) -> Finding:
    # A module that is built in has a folder only if it has parameters or a driver; /sys/bus tells for those.
    present = Path("/sys/module", name).exists() or Path("/sys/bus/vdpa/drivers", name).exists()
    if present:
        return Finding(f"module {name}", "good", "loaded")
    return Finding(
        f"module {name}",
        "bad",
        "not loaded",
        f"modprobe {name}; if there is none, the kernel was built without it",
    )


def _device(path: Path, remedy: str) -> Finding:
    if not path.exists():
        return Finding(str(path), "bad", "missing", remedy)
    if not os.access(path, os.R_OK | os.W_OK):
        return Finding(
            str(path), "bad", "no permission", "run as root with the device allowed in the container"
        )
    return Finding(str(path), "good", "present")


def _privilege() -> Finding:
    capabilities = re.search(r"^CapEff:\s*([0-9a-f]+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    admin, net_admin = 1 << 21, 1 << 12  # CAP_SYS_ADMIN, CAP_NET_ADMIN, capability.h
    held = int(capabilities[1], 16) if capabilities else 0
    if held & admin and held & net_admin:
        return Finding("privileges", "good", "CAP_SYS_ADMIN, CAP_NET_ADMIN")
    return Finding("privileges", "bad", "CAP_SYS_ADMIN or CAP_NET_ADMIN missing", "run as root")


def _tool(name: str, package: str) -> Finding:
    path = shutil.which(name)
    if path:
        return Finding(name, "good", path)
    return Finding(name, "warning", "not found", f"install {package}, or do without that file system")


def _server_of(pool: PoolConfig) -> Finding:
    check, location = f"pool {pool.name}", pool.location.partition("?")[0]
    path = location.removeprefix("unix:")
    if path == location:
        return Finding(check, "good", f"at {location}, which was not asked")
    if not Path(path).is_socket():
        return Finding(
            check, "bad", f"{path} is no socket", "start the storage server, or mount its directory"
        )
    return Finding(check, "good", location)


def _disk(socket: Path) -> Finding:
    """Ask a vhost-user server for its disk, as an attach would."""
    check = f"vhost-user {socket}"
    try:
        offer = frontend.probe(socket)
        offer.check(read_only=False, without_flush=False, keeps_log=False)
    except VduseError as error:
        return Finding(check, "bad", error.message, error.hint)
    way = "direct" if offer.keeps_log else "mediated, for it keeps no log"
    return Finding(check, "good", f"{offer.capacity_bytes >> 20} MiB, {offer.queues} queues; {way}")


def _pool(pool: PoolConfig) -> Finding:
    check, directory = f"pool {pool.name}", pool.directory
    if not directory.is_dir():
        return Finding(check, "bad", f"{directory} is no directory", f"mkdir -p {directory}")
    if not os.access(directory, os.W_OK | os.X_OK):
        return Finding(check, "bad", f"{directory} is not writable", "give root the right to write there")
    status = os.statvfs(directory)
    free = status.f_bavail / max(1, status.f_blocks)
    seen = f"{status.f_bavail * status.f_frsize >> 20} MiB free of {status.f_blocks * status.f_frsize >> 20}"
    if free < MIN_POOL_FREE:
        return Finding(check, "warning", seen, "volumes are thin: a full file system fails their writes")
    return Finding(check, "good", seen)
