"""How full a mounted file system is. statfs(2) can hang on a dead device, so a child process asks."""

from __future__ import annotations

from dataclasses import dataclass

from csi_vduse.errors import CommandFailed, Unavailable
from csi_vduse.run import run

STATFS_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Usage:
    """Filling level; inodes are None where the file system makes them as needed (btrfs)."""

    total_bytes: int
    available_bytes: int
    used_bytes: int
    total_inodes: int | None
    free_inodes: int | None


async def file_system_usage(path: str) -> Usage:
    """Ask a mounted file system how full it is; also proves that it answers.

    Raises:
        Unavailable: it answers with an error, as one does whose device is gone.
        DeadlineExceeded: it does not answer.
    """
    try:
        # stat(1): block size, blocks in all, available to users, free, inodes in all, free.
        output = await run(
            ["stat", "--file-system", "--format=%S %b %a %f %c %d", path], timeout_s=STATFS_TIMEOUT_S
        )
    except CommandFailed as error:
        raise Unavailable(
            f"the file system at {path} does not work: {error.output.strip()}",
            hint="look at the kernel log; unstage the volume and stage it again",
        ) from error
    return parse_usage(output.stdout)


def parse_usage(line: str) -> Usage:
    """Compute the levels from the six numbers; pure."""
    block_bytes, blocks, available, free, inodes, free_inodes = map(int, line.split())
    return Usage(
        total_bytes=blocks * block_bytes,
        available_bytes=available * block_bytes,
        used_bytes=(blocks - free) * block_bytes,
        total_inodes=inodes or None,
        free_inodes=free_inodes if inodes else None,
    )
