"""NodeUnstageVolume: the volume's mount and device are gone when it says so, because it looked.

A missing mount, device or volume is not an error: what should not be there is not there.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from csi_vduse import log
from csi_vduse.agent.model import Bus, device_name
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, VduseError
from csi_vduse.node.context import NodeContext, Observed, look
from csi_vduse.node.limits import lift
from csi_vduse.node.mounts import top_mount, unmount
from csi_vduse.node.stale import foreign_mount, is_stale
from csi_vduse.run import run

FORGET_TIMEOUT_S = 30.0


async def unstage(node: NodeContext, volume_id: str, staging_path: str) -> None:
    """Unmount the volume and detach its device.

    Args:
        node: what to work with.
        volume_id: may be unknown.
        staging_path: as check_path returns it.

    Raises:
        FailedPrecondition: it is still published, or in use; or something else is mounted at the path.
        DeadlineExceeded: writing back the last data did not end.
    """
    observed = await look(node, volume_id)
    refuse_published(observed, staging_path)
    mount = top_mount(observed.mounts, staging_path)
    if mount is not None:
        if mount not in observed.uses() and not is_stale(mount, node.sysfs):
            raise foreign_mount(observed, mount)
        await unmount_unlimited(node, observed, staging_path)
        if mount.fs_type == "btrfs":
            await forget_btrfs_device(mount.source)
    await node.agent.detach(volume_id)
    await prove_gone(node, volume_id, staging_path)
    if node.foreign is not None:
        await node.foreign.forget(volume_id)


async def unmount_unlimited(node: NodeContext, observed: Observed, path: str) -> None:
    """Unmount without the volume's limits: the last data is written back now, and the volume's users are gone."""
    async with AsyncExitStack() as undo:
        if observed.attachment is not None:
            try:
                await lift(node, observed.attachment, undo)
            except VduseError as error:
                log.get().warning("unmounting with limits in force", error=str(error))
        try:
            await unmount(path)
        except DeadlineExceeded:
            undo.pop_all()  # the kernel goes on with it
            raise


def refuse_published(observed: Observed, staging_path: str) -> None:
    """Refuse while anything but the staging path uses the volume."""
    others = sorted(mount.mount_point for mount in observed.uses() if mount.mount_point != staging_path)
    if others:
        raise FailedPrecondition(
            f"the volume is still in use at {', '.join(others)}",
            hint="unpublish it there first, then unstage",
        )


async def forget_btrfs_device(device: str) -> None:
    """Make the kernel forget a btrfs device: it remembers by name, and the name will mean another disk.

    Failing is harmless now and is logged: the volume is unmounted already.
    """
    try:
        await run(["btrfs", "device", "scan", "--forget", device], timeout_s=FORGET_TIMEOUT_S)
    except VduseError as error:
        log.get().warning("btrfs did not forget a device", device=device, error=str(error))


async def prove_gone(node: NodeContext, volume_id: str, staging_path: str) -> None:
    """Look again: neither mount nor attachment may be left, nor a device that no attachment knows any more.

    Raises:
        FailedPrecondition: says what is left.
    """
    observed = await look(node, volume_id)
    if top_mount(observed.mounts, staging_path) is not None:
        raise FailedPrecondition(f"{staging_path} is still a mount point", hint="retry")
    if observed.attachment is not None:
        what = "disk" if observed.attachment.spec.bus is Bus.VIRTIO else "vhost device"
        raise FailedPrecondition(f"volume {volume_id} still has its {what}", hint="retry")
    for place in ("class/vduse", "bus/vdpa/devices"):
        if (left := node.sysfs / place / device_name(volume_id)).exists():
            raise FailedPrecondition(
                f"volume {volume_id} still has a device: {left}", hint="see `csi-vduse doctor --plan`"
            )
