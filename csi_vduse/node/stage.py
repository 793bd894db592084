"""NodeStageVolume: from a volume's id to a device that is proved to be it and, if wanted, mounted.

`stage` reads as the list of what happens. Whatever fails, everything done before it is undone in reverse, so
a failed stage leaves no mount and no device, unless somebody keeps them in use; the next call goes on from there. What
stays is the record of a format begun or done: it is true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_vduse import log
from csi_vduse.agent.model import Attachment, AttachSpec, Bus, BusDevice, State
from csi_vduse.dataplane.throttle import UNLIMITED
from csi_vduse.errors import AlreadyExists, CommandFailed, FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.node import mounts
from csi_vduse.node.context import NodeContext, Observed, device_number, get_volume, look, serving_device
from csi_vduse.node.disk import prove_disk
from csi_vduse.node.expand import fill_device
from csi_vduse.node.filesystems import Filesystem, get_filesystem
from csi_vduse.node.foreign import EPOCH, URI
from csi_vduse.node.formatting import ensure_formatted, forget_begun_format
from csi_vduse.node.limits import lift
from csi_vduse.node.options import combine, of_staging
from csi_vduse.node.stale import clear_stale
from csi_vduse.volumes.context import READ_ONLY
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.policy import READER_MODES, AccessMode, Use, objection


@dataclass(frozen=True)
class StageRequest:
    """What is to be staged, where and how; the path as check_path returns it.

    Args:
        volume_id: what.
        staging_path: where.
        use: how.
        context: the volume's attributes, and what ControllerPublishVolume told.
        served_read_only: its server refuses writes.
    """

    volume_id: str
    staging_path: str
    use: Use
    context: Mapping[str, str] = field(default_factory=dict)
    served_read_only: bool = False

    @property
    def read_only(self) -> bool:
        """Whether the device itself refuses writes."""
        return self.served_read_only or self.use.mode in READER_MODES or self.context.get(READ_ONLY) == "true"


async def stage(node: NodeContext, request: StageRequest) -> None:
    """Make a volume ready on this node. Repeating it proves that it is, and mends nothing that is right.

    Raises:
        NotFound: no such volume.
        InvalidArgument: the volume can never be used so, or a mount option is not allowed.
        AlreadyExists: staged already, but otherwise.
        FailedPrecondition: it holds something else, is mounted elsewhere, or the path is taken.
        Unavailable, DeadlineExceeded: the device cannot be had or does not answer; retry.
        DataLoss: its file system is damaged, or gone.
    """
    observed = await look(node, request.volume_id)
    volume, served_read_only = await described_volume(node, request, observed)
    request = replace(request, served_read_only=served_read_only)
    refuse_impossible(volume, request.use)
    await clear_stale(node, observed, request.staging_path)
    if request.use.filesystem is None and not request.read_only:
        await forget_begun_format(node, volume)
    async with AsyncExitStack() as undo:
        attachment = await attach(node, volume, observed, request, undo)
        device = serving_device(attachment)
        if attachment.spec.bus is Bus.VIRTIO:
            await prove_disk(
                node.sysfs,
                device_number(device),
                volume_id=volume.id,
                serial=attachment.spec.disk_serial,
                size_bytes=volume.capacity_bytes,
                read_only=request.read_only,
            )
        if request.use.filesystem is None:
            refuse_mounted(observed)
        elif not is_mounted(observed, request, get_filesystem(request.use.filesystem)):
            await lift(node, attachment, undo)
            await mount_volume(node, volume, device, request, undo)
            attachment = replace(attachment, spec=replace(attachment.spec, throttle=UNLIMITED))
        if attachment.spec.throttle != volume.throttle:
            await node.agent.throttle(volume.id, volume.throttle)
        undo.pop_all()


async def described_volume(
    node: NodeContext, request: StageRequest, observed: Observed
) -> tuple[Volume, bool]:
    """Return the registry's volume, or one that the request describes; and whether its server refuses writes."""
    known = await node.registry.get_volume(request.volume_id)
    if known is not None or node.foreign is None or URI not in request.context:
        return await get_volume(node, request.volume_id), False
    given = None
    if observed.attachment is not None:
        given = await node.foreign.staged(request.volume_id, request.context)
    if given is None:
        refuse_unfenced(request)
        given = await node.foreign.adopt(request.volume_id, request.context, node.data_path)
    return given.volume, given.read_only


def refuse_unfenced(request: StageRequest) -> None:
    """Refuse that several nodes write an export that was made beforehand; without a pool no controller is asked."""
    if request.use.mode is AccessMode.MULTI_NODE_MULTI_WRITER and EPOCH not in request.context:
        raise InvalidArgument(
            "nobody fences an export that was made beforehand, so one node at a time may write it"
        )


def refuse_impossible(volume: Volume, use: Use) -> None:
    """Refuse what no retry can make possible, before anything is touched."""
    reason = objection(use, backend=volume.backend, bus=volume.parameters.bus)
    if reason:
        raise InvalidArgument(reason)
    combine((), use.mount_flags, read_only=use.mode in READER_MODES)


async def attach(
    node: NodeContext, volume: Volume, observed: Observed, request: StageRequest, undo: AsyncExitStack
) -> Attachment:
    """Have the agent attach the volume, without limits yet, or take the attachment that is there if it is the same."""
    parameters = volume.parameters
    spec = AttachSpec(
        volume_id=volume.id,
        backend=await node.data_path(volume, request.context),
        capacity_bytes=volume.capacity_bytes,
        bus=parameters.bus,
        read_only=request.read_only,
        queues=parameters.queues,
        queue_size=parameters.queue_size,
        block_size_bytes=parameters.block_size_bytes,
    )
    present = observed.attachment
    if present is None:
        # Pushed first: the agent may finish an attach whose answer does not reach us.
        undo.push_async_callback(take_back, node.agent.detach, volume.id)
        return await node.agent.attach(spec)
    if present.state is not State.ATTACHED:
        return await node.agent.attach(spec)
    if present.spec.backend != spec.backend:
        raise AlreadyExists(
            f"volume {volume.id} is staged, but what it is served from is another: it was published anew",
            hint="unstage it, which lets go of what this node may not use any more, and stage it again",
        )
    if present.spec.read_only != request.read_only:
        mode = "read-only" if present.spec.read_only else "writable"
        raise AlreadyExists(
            f"volume {volume.id} is staged {mode}", hint="unstage it before staging it otherwise"
        )
    if present.spec.capacity_bytes != volume.capacity_bytes:
        return await node.agent.resize(volume.id, volume.capacity_bytes)
    return present


async def take_back(act: Callable[[str], Awaitable[None]], what: str) -> None:
    """Undo a step of a stage that failed. What stays is left to the next call: it is not why this one failed."""
    try:
        await act(what)
    except VduseError as error:
        log.get().warning("a failed stage leaves something behind", what=what, error=str(error))


def refuse_mounted(observed: Observed) -> None:
    """Refuse to stage a volume as a raw device while it is mounted: two users of one device destroy the data.

    Bind mounts of the device node are publications of the raw device, and fine.
    """
    found = observed.mounted()
    if found:
        raise AlreadyExists(
            f"the volume is staged as a file system at {found[0].mount_point}",
            hint="unstage it before using it raw",
        )


def is_mounted(observed: Observed, request: StageRequest, filesystem: Filesystem) -> bool:
    """Tell whether the volume is mounted at the staging path as asked for.

    Raises:
        AlreadyExists: it is mounted there, but otherwise.
        FailedPrecondition: it is in use in another place only.
    """
    uses = observed.uses()
    top = mounts.top_mount(observed.mounts, request.staging_path)
    if top is None or top not in uses:
        if uses:
            raise FailedPrecondition(
                f"the volume is in use at {uses[0].mount_point} and not staged at {request.staging_path}",
                hint="unpublish and unstage it there first",
            )
        return False
    if top.fs_type != filesystem.name:
        raise AlreadyExists(f"the volume is staged as {top.fs_type}; {filesystem.name} was asked for")
    # With the option it may be staged so on purpose: with others that need it, or by a release that knew no better.
    if top.is_write_protected and not request.read_only and "ro" not in request.use.mount_flags:
        raise FailedPrecondition(
            f"the file system at {request.staging_path} has become read-only",
            hint="it met I/O errors: look at the kernel log, unstage the volume and stage it again",
        )
    return True


async def mount_volume(
    node: NodeContext, volume: Volume, device: BusDevice, request: StageRequest, undo: AsyncExitStack
) -> None:
    """Format if that is right, check, mount, and let the file system fill its device."""
    filesystem = get_filesystem(request.use.filesystem or "")
    path = str(device.path)
    fresh = await ensure_formatted(
        node, volume, path, filesystem, size_bytes=volume.capacity_bytes, read_only=request.read_only
    )
    if not fresh and not request.read_only:
        await filesystem.check(path)
    prepare_directory(request.staging_path, undo)
    undo.push_async_callback(take_back, mounts.unmount, request.staging_path)
    await mount_file_system(path, request, filesystem)
    prove_mounted(device, request.staging_path)
    if not fresh and not request.read_only:
        await fill_device(filesystem, path, request.staging_path, volume.capacity_bytes)


def prepare_directory(path: str, undo: AsyncExitStack) -> None:
    """See that there is a directory to mount on; the orchestrator should have made it, but need not.

    Raises:
        FailedPrecondition: the path is something else.
    """
    directory = Path(path)
    if directory.is_symlink() or (directory.exists() and not directory.is_dir()):
        raise FailedPrecondition(f"staging path {path} is not a directory", hint="remove what is there")
    if not directory.exists():
        directory.mkdir(parents=True)

        def remove() -> None:
            with contextlib.suppress(OSError):
                directory.rmdir()

        undo.callback(remove)


async def mount_file_system(device: str, request: StageRequest, filesystem: Filesystem) -> None:
    """Mount; on a device that refuses writes, without replaying the log if that is what stands in the way."""
    flags = of_staging(request.use.mount_flags)
    options = combine(filesystem.default_options, flags, read_only=request.read_only)
    try:
        await mounts.mount_device(device, request.staging_path, fs_type=filesystem.name, options=options)
    except CommandFailed as error:
        if not request.read_only:
            raise FailedPrecondition(
                f"{filesystem.name} on {device} cannot be mounted: {error.output.strip()}",
                hint="check the mount options and the kernel log",
            ) from error
        log.get().warning("mounting without replay of the log: the last writes before a crash are not seen")
        await mounts.mount_device(
            device,
            request.staging_path,
            fs_type=filesystem.name,
            options=[*options, filesystem.skip_replay_option],
        )


def prove_mounted(device: BusDevice, path: str) -> None:
    """See that what is mounted is this device: btrfs mounts by UUID and could take a clone's source.

    Raises:
        FailedPrecondition: another device is mounted.
    """
    table = mounts.read_mounts()
    top = mounts.top_mount(table, path)
    if top not in mounts.device_mounts(table, device_number(device), str(device.path)):
        found = top.source if top else "nothing"
        raise FailedPrecondition(f"mounted {device.path} at {path}, but {found} is there")
