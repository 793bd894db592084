"""ext4, through e2fsprogs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_vduse.errors import CommandFailed, DataLoss, VduseError
from csi_vduse.node.filesystems.base import CHECK_TIMEOUT_S, GROW_TIMEOUT_S, MKFS_TIMEOUT_S, QUERY_TIMEOUT_S
from csi_vduse.run import run

# e2fsck(8): 1 = errors corrected, 2 = corrected and a mounted file system should be remounted (ours is not).
_E2FSCK_MENDED = (0, 1, 2)


@dataclass(frozen=True)
class Ext4:
    """See Filesystem."""

    name: str = "ext4"
    min_size_bytes: int = 1 << 20
    default_options: tuple[str, ...] = ()
    skip_replay_option: str = "norecovery"

    async def make(self, device: str) -> None:
        """Make an empty ext4; no blocks are kept back for root, as whole volumes belong to workloads."""
        await run(["mkfs.ext4", "-q", "-m", "0", "-E", "nodiscard", device], timeout_s=MKFS_TIMEOUT_S)

    async def check(self, device: str) -> None:
        """Replay the journal and mend what is safe to mend: e2fsck -p."""
        try:
            await run(["e2fsck", "-p", device], timeout_s=CHECK_TIMEOUT_S, ok_codes=_E2FSCK_MENDED)
        except CommandFailed as error:
            raise DataLoss(
                f"e2fsck found errors on {device} that it does not mend by itself: {error.output.strip()}",
                hint="take a snapshot, then run `e2fsck -f` on a clone of it",
            ) from error

    async def size_bytes(self, device: str, mount_point: str) -> int:  # noqa: ARG002
        """Read the size from the superblock, which ext4 and readers of the device share in the page cache."""
        header = (await run(["dumpe2fs", "-h", device], timeout_s=QUERY_TIMEOUT_S)).stdout
        blocks = re.search(r"^Block count:\s*(\d+)$", header, re.MULTILINE)
        block_bytes = re.search(r"^Block size:\s*(\d+)$", header, re.MULTILINE)
        if blocks is None or block_bytes is None:
            raise VduseError(f"dumpe2fs did not tell the size of {device}")
        return int(blocks[1]) * int(block_bytes[1])

    async def grow(self, device: str, mount_point: str) -> None:  # noqa: ARG002
        """Grow online; resize2fs finds the mount point by itself."""
        await run(["resize2fs", device], timeout_s=GROW_TIMEOUT_S)
