"""XFS, through xfsprogs."""

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

# mkfs.xfs sets it first and clears it last; the kernel mounts nothing that has it (sb_inprogress).
_IN_PROGRESS = re.compile(r"^inprogress = (\d+)$", re.MULTILINE)
_GEOMETRY = re.compile(r"^data\s+=\s+bsize=(\d+)\s+blocks=(\d+)", re.MULTILINE)


@dataclass(frozen=True)
class Xfs:
    """See Filesystem.

    ``nouuid`` always: a clone or restored snapshot carries its source's UUID, and must mount beside it. The
    UUID is never rewritten, because that needs a clean log and drivers that did it have lost data.
    """

    name: str = "xfs"
    min_size_bytes: int = 300 << 20  # mkfs.xfs(8) since xfsprogs 5.19
    default_options: tuple[str, ...] = ("nouuid",)
    skip_replay_option: str = "norecovery"

    async def make(self, device: str, uuid: str) -> None:
        """Make an empty XFS; -K: do not discard."""
        await run(["mkfs.xfs", "-q", "-K", "-m", f"uuid={uuid}", device], timeout_s=MKFS_TIMEOUT_S)

    async def examine(self, device: str) -> Making:
        """Look at the mark that mkfs takes off last, then have xfs_repair look at everything."""
        output = await run(
            ["xfs_db", "-r", "-c", "sb 0", "-c", "print inprogress", device], timeout_s=QUERY_TIMEOUT_S
        )
        mark = _IN_PROGRESS.search(output.stdout)
        if mark is None:
            raise VduseError(f"xfs_db did not tell whether the file system on {device} is finished")
        if mark[1] != "0":
            return Making.UNFINISHED
        try:
            await run(["xfs_repair", "-n", device], timeout_s=CHECK_TIMEOUT_S)
        except CommandFailed as error:
            if saw_damage(error):
                return Making.DAMAGED
            raise Unavailable(
                f"xfs_repair could not look at {device}: {error}", hint="no damage was seen; retry"
            ) from error
        return Making.WHOLE

    async def check(self, device: str) -> None:
        """Do nothing: mounting replays the log, and xfs_repair is for people (fsck.xfs(8))."""

    async def size_bytes(self, device: str, mount_point: str) -> int:  # noqa: ARG002
        """Ask the kernel for the geometry: -n changes nothing."""
        geometry = (await run(["xfs_growfs", "-n", mount_point], timeout_s=QUERY_TIMEOUT_S)).stdout
        match = _GEOMETRY.search(geometry)
        if match is None:
            raise VduseError(f"xfs_growfs did not tell the size of {mount_point}")
        return int(match[1]) * int(match[2])

    async def grow(self, device: str, mount_point: str) -> None:  # noqa: ARG002
        """Grow the data section online."""
        await run(["xfs_growfs", "-d", mount_point], timeout_s=GROW_TIMEOUT_S)
