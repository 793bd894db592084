"""ext4, through e2fsprogs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_vduse import log
from csi_vduse.errors import CommandFailed, DataLoss, Unavailable, VduseError
from csi_vduse.node.filesystems.base import (
    CHECK_TIMEOUT_S,
    GROW_TIMEOUT_S,
    MKFS_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    Making,
)
from csi_vduse.run import run

# e2fsck(8), a sum: 1 = errors corrected, 2 = corrected and a mounted file system should be remounted (ours is
# not), 4 = errors left. Beyond: it could not do its work, which says nothing of the file system, but for these words.
_MENDED = (0, 1, 2, 3)
_LEFT = 4
_SUPERBLOCK_LOST = re.compile(
    r"superblock could not be read or does not describe|Corruption found in superblock"
)
_NEVER_MOUNTED = (r"^Mount count:\s*0$", r"^Last mount time:\s*n/a$")
# In use as e2fsck says it: EBUSY, or a mount that it sees itself (check_mount in e2fsck/unix.c).
_CLAIMED = re.compile(r"is (in use|mounted)\.")


@dataclass(frozen=True)
class Ext4:
    """See Filesystem."""

    name: str = "ext4"
    min_size_bytes: int = 1 << 20
    default_options: tuple[str, ...] = ()
    skip_replay_option: str = "norecovery"

    async def make(self, device: str, uuid: str) -> None:
        """Make an empty ext4; no blocks are kept back for root, as whole volumes belong to workloads."""
        await run(
            ["mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", "-U", uuid, device], timeout_s=MKFS_TIMEOUT_S
        )

    async def examine(self, device: str) -> Making:
        """Have e2fsck look at everything; what it does not find right was never mounted if the superblock says so."""
        try:
            await run(["e2fsck", "-f", "-n", device], timeout_s=CHECK_TIMEOUT_S)
        except CommandFailed as error:
            if not _saw_damage(error):
                raise _could_not_look(device, error) from error
            return Making.UNFINISHED if await _was_never_mounted(device) else Making.DAMAGED
        return Making.WHOLE

    async def check(self, device: str) -> None:
        """Replay the journal and mend what is safe to mend: e2fsck -p. One that the kernel has in use needs neither."""
        try:
            await run(["e2fsck", "-p", device], timeout_s=CHECK_TIMEOUT_S, ok_codes=_MENDED)
        except CommandFailed as error:
            if _saw_damage(error):
                raise DataLoss(
                    f"e2fsck found errors on {device} that it does not mend by itself: {error.output.strip()}",
                    hint="take a snapshot, then run `e2fsck -f` on a clone of it",
                ) from error
            if not _CLAIMED.search(error.output):
                raise _could_not_look(device, error) from error
            # Mounted where we do not see it: mounting it again shows the same, living file system, or fails.
            log.get().warning("e2fsck does not look at a device that is in use", device=device)

    async def size_bytes(self, device: str, mount_point: str) -> int:  # noqa: ARG002
        """Read the size from the superblock, which ext4 and readers of the device share in the page cache."""
        header = (await run(["dumpe2fs", "-h", device], timeout_s=QUERY_TIMEOUT_S)).stdout
        return _number(header, "Block count", device) * _number(header, "Block size", device)

    async def grow(self, device: str, mount_point: str) -> None:  # noqa: ARG002
        """Grow online; resize2fs finds the mount point by itself."""
        await run(["resize2fs", device], timeout_s=GROW_TIMEOUT_S)


def _saw_damage(error: CommandFailed) -> bool:
    if error.exit_code < 0:
        return False
    return bool(error.exit_code & _LEFT) or _SUPERBLOCK_LOST.search(error.output) is not None


def _could_not_look(device: str, error: CommandFailed) -> Unavailable:
    return Unavailable(
        f"e2fsck could not look at {device}: {error}", hint="no damage was seen and nothing changed; retry"
    )


async def _was_never_mounted(device: str) -> bool:
    """Read it in the superblock, whatever else is damaged: -c reads nothing beside it (debugfs(8))."""
    argv = ["debugfs", "-c", "-R", "show_super_stats -h", device]
    header = (await run(argv, timeout_s=QUERY_TIMEOUT_S)).stdout
    return all(re.search(line, header, re.MULTILINE) for line in _NEVER_MOUNTED)


def _number(header: str, field: str, device: str) -> int:
    match = re.search(rf"^{field}:\s*(\d+)$", header, re.MULTILINE)
    if match is None:
        raise VduseError(f"dumpe2fs did not tell the {field.lower()} of {device}")
    return int(match[1])
