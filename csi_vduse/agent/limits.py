"""How many volumes this node takes, when nobody said: what memory, descriptors and processes allow.

A pure function of what the machine has, and one that asks the machine. The scheduler places pods by this number
(NodeGetInfo, max_volumes_per_node), so it is what the node can serve at once, not what its disks could hold.
"""

from __future__ import annotations

import os
import resource
from dataclasses import dataclass
from pathlib import Path

_MIB = 1 << 20
# One process, one device each; above this the agent's own bookkeeping was never tried.
_CEILING = 256
# A worker's private memory with its queues' tables, and the bounce pages of a disk in ordinary use.
_VOLUME_BYTES = 48 * _MIB
# The rest is for the workloads.
_MEMORY_SHARE = 4
# The agent holds a pidfd and a control socket of each worker, and a few more while it attaches.
_FILES_PER_VOLUME = 4
_FILES_OF_AGENT = 64
_OWN_CGROUP_PIDS = Path("/sys/fs/cgroup/pids.max")


@dataclass(frozen=True)
class Machine:
    """What bounds the number of workers: bytes of memory, descriptors of the agent, processes and threads."""

    memory_bytes: int
    open_files: int
    processes: int


def volume_limit(machine: Machine, *, queues: int) -> int:
    """Return how many volumes of `queues` queues each can be attached at once; at least 1."""
    threads = 1 + queues
    return max(
        1,
        min(
            _CEILING,
            machine.memory_bytes // _MEMORY_SHARE // _VOLUME_BYTES,
            (machine.open_files - _FILES_OF_AGENT) // _FILES_PER_VOLUME,
            machine.processes // 2 // threads,
        ),
    )


def this_machine() -> Machine:
    """Ask the kernel (sysconf(3), getrlimit(2), the cgroup's pids.max)."""
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    processes = [_limit(resource.RLIMIT_NPROC), int(Path("/proc/sys/kernel/threads-max").read_text())]
    if _OWN_CGROUP_PIDS.exists() and (text := _OWN_CGROUP_PIDS.read_text().strip()) != "max":
        processes.append(int(text))
    return Machine(
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        open_files=files,
        processes=min(processes),
    )


def _limit(which: int) -> int:
    soft, _ = resource.getrlimit(which)
    return 1 << 30 if soft == resource.RLIM_INFINITY else soft
