"""The lock by which one agent has a run directory: on the directory itself, dropped by the kernel with the process.

The first process looks at it too, so nothing here may import gRPC or asyncio (spawner.py says why).
"""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path


def open_place(run_dir: Path) -> int:
    """Open what `lock` takes; closing it gives the lock back."""
    return os.open(run_dir, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)


def lock(fd: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Take the lock unless somebody else has it; returns whether we have it."""
    try:
        fcntl.flock(fd, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno == errno.EWOULDBLOCK:
            return False
        raise
    return True


def is_vacant(run_dir: Path) -> bool:
    """Whether no agent has the directory; False also if we cannot look."""
    try:
        fd = open_place(run_dir)
    except OSError:
        return False
    try:
        return lock(fd, fcntl.LOCK_SH)  # held for a moment: whoever looks as well sees no agent in us
    finally:
        os.close(fd)
