"""NodeUnpublishVolume: nothing is mounted at the target path and the path itself is gone."""

from __future__ import annotations

import errno
from pathlib import Path

from csi_vduse.errors import FailedPrecondition
from csi_vduse.node.context import NodeContext, look
from csi_vduse.node.mounts import top_mount, unmount
from csi_vduse.node.stale import foreign_mount, is_stale


async def unpublish(node: NodeContext, volume_id: str, target_path: str) -> None:
    """Take the volume away from a workload's path. A path that is gone is fine.

    Args:
        node: what to work with.
        volume_id: may be unknown.
        target_path: as check_path returns it.

    Raises:
        FailedPrecondition: the mount is in use or is not the volume's, or the path holds files.
        DeadlineExceeded: the unmount did not end.
    """
    observed = await look(node, volume_id)
    mount = top_mount(observed.mounts, target_path)
    if mount is not None:
        if mount not in observed.uses() and not is_stale(mount, node.sysfs):
            raise foreign_mount(observed, mount)
        await unmount(target_path)
    remove_target(target_path)


def remove_target(path: str) -> None:
    """Remove an empty directory or an empty file; never anything with content.

    Raises:
        FailedPrecondition: it has content, or is something else.
    """
    target = Path(path)
    try:
        if target.is_dir() and not target.is_symlink():
            target.rmdir()
        elif target.is_file() and not target.is_symlink() and target.stat().st_size == 0:
            target.unlink()
        elif target.exists() or target.is_symlink():
            raise FailedPrecondition(
                f"target path {path} holds something that we did not make", hint="remove it by hand"
            )
    except OSError as error:
        if error.errno in {errno.ENOTEMPTY, errno.EEXIST}:
            text = f"target path {path} is not empty although nothing is mounted there"
            raise FailedPrecondition(text, hint="remove its content by hand") from error
        raise FailedPrecondition(f"target path {path} cannot be removed: {error.strerror}") from error
