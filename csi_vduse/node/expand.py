"""NodeExpandVolume: the device, then the file system on it, take over the capacity that the registry has.

The controller has grown the image before; here nothing is made larger than the registry says, and the answer
is given only when the size was seen. Of a volume that the registry does not know its server says how large it is.
"""

from __future__ import annotations

from contextlib import AsyncExitStack

from csi_vduse.agent.model import Attachment, Bus
from csi_vduse.errors import FailedPrecondition, OutOfRange, Unavailable, VduseError
from csi_vduse.node.context import NodeContext, Observed, device_number, get_volume, look, serving_device
from csi_vduse.node.disk import wait_for_size
from csi_vduse.node.filesystems import Filesystem, get_filesystem
from csi_vduse.node.limits import lift
from csi_vduse.node.mounts import Mount
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.sizes import CapacityRange

# A file system may leave less than this unused at the end: ext4 takes no last block group too small for its
# own tables, xfs no group below 16 MiB.
SLACK_BYTES = 16 << 20


async def expand(node: NodeContext, volume_id: str, volume_path: str, wanted: CapacityRange) -> int:
    """Make the node see a volume's new capacity; returns it in bytes.

    Args:
        node: what to work with.
        volume_id: the volume.
        volume_path: where it is published or staged, as check_path returns it.
        wanted: what the caller expects.

    Raises:
        NotFound: no such volume, or it is not on this node at that path.
        OutOfRange: its capacity is not what the caller wants; the controller, or its server, has to grow it first.
        FailedPrecondition: it is mounted read-only, or the file system did not grow.
        Unavailable, DeadlineExceeded: the device does not answer.
    """
    volume = await get_volume(node, volume_id)
    observed = await look(node, volume_id)
    if observed.attachment is None:
        raise FailedPrecondition(f"volume {volume_id} is not staged on this node", hint="stage it first")
    serving_device(observed.attachment)
    grown = await growth_at_its_server(node, observed.attachment)
    volume = grown or volume
    if not wanted.allows(volume.capacity_bytes):
        raise OutOfRange(
            f"volume {volume_id} has {volume.capacity_bytes} bytes; {wanted.required_bytes} to"
            f" {wanted.limit_bytes or 'any'} are wanted",
            hint="grow the export at its server first" if grown else "ControllerExpandVolume comes first",
        )
    attachment = await node.agent.resize(volume_id, volume.capacity_bytes)
    device = serving_device(attachment)
    if attachment.spec.bus is not Bus.VIRTIO:
        return volume.capacity_bytes
    number = device_number(device)
    await wait_for_size(node.sysfs, number, volume.capacity_bytes)
    mounted = whole_file_systems(observed)
    if not mounted:
        return volume.capacity_bytes
    at = next((mount for mount in mounted if mount.mount_point == volume_path), mounted[0])
    if at.is_write_protected:
        raise FailedPrecondition(
            f"the file system at {at.mount_point} is read-only and cannot grow",
            hint="stage the volume with a writable access mode",
        )
    # A read-only bind refuses the ioctl: grow through a writable mount point of the same file system.
    writable = next((mount for mount in mounted if not mount.read_only), at)
    async with AsyncExitStack() as undo:
        await lift(node, attachment, undo, otherwise=volume.throttle)
        await fill_device(
            get_filesystem(at.fs_type), str(device.path), writable.mount_point, volume.capacity_bytes
        )
    return volume.capacity_bytes


async def growth_at_its_server(node: NodeContext, attachment: Attachment) -> Volume | None:
    """Return a volume that the registry does not know as its server has it now; None for all others.

    Raises:
        Unavailable: the server does not say.
    """
    if node.foreign is None:
        return None
    try:
        return await node.foreign.take_over_growth(attachment.volume_id, attachment.spec.backend)
    except VduseError as error:
        raise Unavailable(
            f"the server of volume {attachment.volume_id} does not say how large it is now: {error}",
            hint="retry; if it allows no further connection, unstage the volume and stage it again",
        ) from error


def whole_file_systems(observed: Observed) -> tuple[Mount, ...]:
    """Return the mounts of the volume through which its file system can grow; nothing if it is not mounted.

    A part of it that is mounted elsewhere (kubelet's subPath) may be a file. A subvolume of btrfs, which shows as a part
    too, is as good as the whole: it is what a default subvolume or `subvol=` mounts.

    Raises:
        FailedPrecondition: only parts are mounted.
    """
    mounted = observed.mounted()
    whole = tuple(mount for mount in mounted if mount.root == "/" or mount.fs_type == "btrfs")
    if mounted and not whole:
        raise FailedPrecondition(
            f"only a part of the volume's file system is mounted, at {mounted[0].mount_point}; it cannot grow so",
            hint="stage the volume",
        )
    return whole


async def fill_device(filesystem: Filesystem, device: str, mount_point: str, size_bytes: int) -> None:
    """Grow a mounted file system to its device if it does not fill it, and see that it has grown.

    Raises:
        FailedPrecondition: it is still smaller afterwards.
        CommandFailed, DeadlineExceeded: from the tool.
    """
    least_bytes = size_bytes - SLACK_BYTES
    before_bytes = await filesystem.size_bytes(device, mount_point)
    if before_bytes >= size_bytes:
        return
    await filesystem.grow(device, mount_point)
    after_bytes = await filesystem.size_bytes(device, mount_point)
    if after_bytes < max(least_bytes, before_bytes):
        raise FailedPrecondition(
            f"{filesystem.name} on {device} has {after_bytes} bytes after growing, the device {size_bytes}",
            hint="look at the kernel log",
        )
