"""btrfs on one device, through btrfs-progs."""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_vduse.errors import CommandFailed, Unavailable, VduseError
from csi_vduse.node.filesystems.base import (
    CHECK_TIMEOUT_S,
    GROW_TIMEOUT_S,
    MKFS_TIMEOUT_S,
    QUERY_TIMEOUT_S,
    Making,
    saw_damage,
)
from csi_vduse.run import run

_DEVICE_SIZE = re.compile(r"^\s*Device size:\s*(\d+)\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Btrfs:
    """See Filesystem."""

    name: str = "btrfs"
    min_size_bytes: int = 114294784  # 109 MiB: what mkfs.btrfs(8) of btrfs-progs 6.2 asks for one device
    default_options: tuple[str, ...] = ()
    skip_replay_option: str = "rescue=nologreplay"

    async def make(self, device: str, uuid: str) -> None:
        """Make an empty btrfs; -K: do not discard."""
        await run(["mkfs.btrfs", "-q", "-K", "-U", uuid, device], timeout_s=MKFS_TIMEOUT_S)

    async def examine(self, device: str) -> Making:
        """Have `btrfs check` look at everything; an unfinished one has no mark that blkid knows (mkfs.btrfs)."""
        try:
            await run(["btrfs", "check", "--readonly", device], timeout_s=CHECK_TIMEOUT_S)
        except CommandFailed as error:
            if saw_damage(error):
                return Making.DAMAGED
            raise Unavailable(
                f"btrfs check could not look at {device}: {error}", hint="no damage was seen; retry"
            ) from error
        return Making.WHOLE

    async def check(self, device: str) -> None:
        """Do nothing: mounting replays the log, and `btrfs check` is for people (fsck.btrfs(8))."""

    async def size_bytes(self, device: str, mount_point: str) -> int:  # noqa: ARG002
        """Ask the kernel how much of its one device the file system takes."""
        usage = (
            await run(["btrfs", "filesystem", "usage", "--raw", mount_point], timeout_s=QUERY_TIMEOUT_S)
        ).stdout
        match = _DEVICE_SIZE.search(usage)
        if match is None:
            raise VduseError(f"btrfs did not tell the size of {mount_point}")
        return int(match[1])

    async def grow(self, device: str, mount_point: str) -> None:  # noqa: ARG002
        """Grow online to the whole device."""
        await run(["btrfs", "filesystem", "resize", "max", mount_point], timeout_s=GROW_TIMEOUT_S)
