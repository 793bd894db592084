"""Small things done to files and directories that more than one part needs. Synchronous."""

from __future__ import annotations

import errno
import os
import secrets
import shutil
from pathlib import Path

# What a file system that is full answers, or one whose quota is used up.
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# Ending of what is not whole yet, or not wanted any more.
UNFINISHED = ".tmp"
_SECTOR_BYTES = 512  # unit of st_blocks, stat(2)


def allocated_bytes(path: Path) -> int:
    """Return what a file occupies, in bytes; 0 if there is none."""
    try:
        return path.stat().st_blocks * _SECTOR_BYTES
    except FileNotFoundError:
        return 0


def unfinished(target: Path) -> Path:
    """Return a name beside `target` that nobody else uses.

    The random part keeps a thread that was given up, and still runs, away from the try that followed it.
    """
    return target.with_name(f"{target.name}.{secrets.token_hex(4)}{UNFINISHED}")


def remove_tree(path: Path) -> None:
    """Remove a directory with all in it; fine if it is gone."""
    try:
        shutil.rmtree(path)
    except FileNotFoundError:
        return


def flush_directory(directory: Path) -> None:
    """Make the names in a directory durable."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
