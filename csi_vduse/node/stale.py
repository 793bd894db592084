"""What may be mounted at a path that a request names, and what is cleared away.

A stale mount is one whose device is gone: a disk that has been removed, or a device node that has been
deleted. It is worth nothing and is taken off. A mount of a live device that is not the volume's is somebody
else's data, and an error.
"""

from __future__ import annotations

from pathlib import Path

from csi_vduse import log
from csi_vduse.errors import FailedPrecondition
from csi_vduse.node.context import NodeContext, Observed
from csi_vduse.node.mounts import Mount, is_deleted_node, top_mount, unmount


def is_stale(mount: Mount, sysfs: Path) -> bool:
    """Tell whether a mount's device is gone."""
    if is_deleted_node(mount):
        return True
    if mount.device.major != 0:
        return not (sysfs / "dev/block" / str(mount.device)).exists()
    # An anonymous number: btrfs names its disk as source; tmpfs and the like have no disk to lose.
    return mount.fs_type == "btrfs" and mount.source.startswith("/dev/") and not Path(mount.source).exists()


async def clear_stale(node: NodeContext, observed: Observed, path: str) -> None:
    """Take stale mounts off a path, leaving the volume's own.

    Raises:
        FailedPrecondition: something alive is mounted there that is not the volume's.
    """
    mount = top_mount(observed.mounts, path)
    if mount is None or mount in observed.uses():
        return
    if is_stale(mount, node.sysfs):
        log.get().warning(
            "taking off a stale mount", path=path, device=str(mount.device), source=mount.source
        )
        await unmount(path)
        return
    raise foreign_mount(observed, mount)


def foreign_mount(observed: Observed, mount: Mount) -> FailedPrecondition:
    """Return the error for a live mount that is not the volume's."""
    owner = observed.owner(mount)
    whose = (
        f"volume {owner.volume_id}" if owner else f"{mount.source} ({mount.fs_type}, device {mount.device})"
    )
    return FailedPrecondition(
        f"{mount.mount_point} is a mount point of {whose}, not of this volume", hint="unmount it, then retry"
    )
