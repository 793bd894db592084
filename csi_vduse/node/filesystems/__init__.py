"""The file systems that volumes can carry, by name."""

from __future__ import annotations

from csi_vduse.errors import InvalidArgument
from csi_vduse.node.filesystems.base import Filesystem, Making
from csi_vduse.node.filesystems.btrfs import Btrfs
from csi_vduse.node.filesystems.ext4 import Ext4
from csi_vduse.node.filesystems.xfs import Xfs

__all__ = ["FILESYSTEMS", "Filesystem", "Making", "get_filesystem"]

FILESYSTEMS: dict[str, Filesystem] = {"ext4": Ext4(), "xfs": Xfs(), "btrfs": Btrfs()}


def get_filesystem(name: str) -> Filesystem:
    """Return a file system by its name.

    Raises:
        InvalidArgument: names those that exist.
    """
    try:
        return FILESYSTEMS[name]
    except KeyError:
        raise InvalidArgument(
            f"file system type {name!r} is not supported", hint=f"use one of {', '.join(FILESYSTEMS)}"
        ) from None
