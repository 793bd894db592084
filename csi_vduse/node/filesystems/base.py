"""What the node code asks of a file system. One file per file system implements it.

Every command has a deadline, and none is given a flag that overrides the tool's own refusal: mkfs runs only
on a device that was proved blank, so it has nothing to refuse. What a checking tool answers is taken for damage
only if it says that it saw damage: one that was killed, had no memory, was called wrongly or found the device
claimed by somebody has seen none.
"""

from __future__ import annotations

import re
from enum import Enum, auto
from typing import Protocol

from csi_vduse.errors import CommandFailed

MKFS_TIMEOUT_S = 600.0
CHECK_TIMEOUT_S = 1800.0
GROW_TIMEOUT_S = 600.0
QUERY_TIMEOUT_S = 60.0


# Of tools that exit with 1 for damage and for what kept them from looking: how they say the second. The words are
# those of strerror(3), and of the tools for a device that is mounted.
_KEPT_FROM_LOOKING = re.compile(
    r"currently mounted|contains a mounted|resource busy|input/output error|allocate memory|memory alloc"
    r"|out of memory|no such (file|device)|permission denied|not permitted",
    re.IGNORECASE,
)


def saw_damage(error: CommandFailed) -> bool:
    """Tell whether `xfs_repair -n` or `btrfs check` ended because of what it saw."""
    return error.exit_code == 1 and _KEPT_FROM_LOOKING.search(error.output) is None


class Making(Enum):
    """How far a mkfs came, by the file system's own account."""

    WHOLE = auto()
    UNFINISHED = auto()  # and it was never mounted
    DAMAGED = auto()  # neither: somebody may have used it


class Filesystem(Protocol):
    """A file system that volumes can carry."""

    @property
    def name(self) -> str:
        """What mount(8) and blkid(8) call it."""

    @property
    def min_size_bytes(self) -> int:
        """The smallest device its mkfs accepts."""

    @property
    def default_options(self) -> tuple[str, ...]:
        """Mount options that every mount gets."""

    @property
    def skip_replay_option(self) -> str:
        """Mount option for a device that cannot be written, whose log can therefore not be replayed."""

    async def make(self, device: str, uuid: str) -> None:
        """Make an empty file system, without discarding first: a fresh volume is thin already.

        uuid: that it gets; how what is left of an interrupted mkfs is known again.

        Raises:
            CommandFailed, DeadlineExceeded: from mkfs.
        """

    async def examine(self, device: str) -> Making:
        """Tell what a mkfs left that may have been interrupted. Reads only; not of a mounted device.

        Raises:
            Unavailable, DeadlineExceeded, FailedPrecondition: the tool could not tell.
        """

    async def check(self, device: str) -> None:
        """Mend what can be mended without a decision of a person, before mounting.

        Raises:
            DataLoss: errors are left that a person must look at.
            Unavailable, DeadlineExceeded, FailedPrecondition: the tool could not do its work.
        """

    async def size_bytes(self, device: str, mount_point: str) -> int:
        """Return how much of the device the mounted file system takes."""

    async def grow(self, device: str, mount_point: str) -> None:
        """Make the mounted file system as large as its device."""
