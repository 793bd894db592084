"""NodePublishVolume: a staged volume appears at a workload's path.

Publishing trusts no earlier call: after a reboot kubelets publish what is no longer staged, and a staging
path that is a directory proves nothing. The mount table and the agent say whether the volume is staged and
alive.
"""

from __future__ import annotations

import contextlib
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from csi_vduse.errors import AlreadyExists, FailedPrecondition
from csi_vduse.node import mounts
from csi_vduse.node.context import NodeContext, Observed, get_volume, look, serving_device
from csi_vduse.node.stage import refuse_impossible
from csi_vduse.node.stale import clear_stale
from csi_vduse.node.usage import file_system_usage
from csi_vduse.volumes.policy import READER_MODES, AccessMode, Use


@dataclass(frozen=True)
class PublishRequest:
    """What is to be published, where and how; paths as check_path returns them."""

    volume_id: str
    staging_path: str
    target_path: str
    use: Use
    read_only: bool

    @property
    def wants_read_only(self) -> bool:
        """Whether writes through the target shall be refused."""
        return self.read_only or self.use.mode in READER_MODES or "ro" in self.use.mount_flags


async def publish(node: NodeContext, request: PublishRequest) -> None:
    """Bind a staged volume to the target path. Repeating it proves that it is there.

    Raises:
        NotFound: no such volume.
        InvalidArgument: the volume can never be used so.
        FailedPrecondition: not staged, published elsewhere though only one workload may have it, or the
            target path is taken.
        AlreadyExists: published there, but otherwise.
        Unavailable, DeadlineExceeded: its device does not answer now.
    """
    volume = await get_volume(node, request.volume_id)
    refuse_impossible(volume, request.use)
    observed = await look(node, volume.id)
    if observed.attachment is not None and observed.attachment.spec.read_only:
        request = replace(request, read_only=True)  # there is no other way to use it
    source = await staged_source(observed, request)
    await clear_stale(node, observed, request.target_path)
    if is_published(observed, request):
        return  # before the next: kubelet's own binds of what is at the target are no second workload
    refuse_second_workload(observed, request)
    async with AsyncExitStack() as undo:
        prepare_target(request.target_path, is_directory=not request.use.is_block, undo=undo)
        await mounts.bind(source, request.target_path, read_only=request.wants_read_only)
        undo.pop_all()


async def staged_source(observed: Observed, request: PublishRequest) -> str:
    """Return what to bind: the staging path or the device node, proved to be the volume's and alive.

    Raises:
        FailedPrecondition: the volume is not staged there, or in the other way.
        Unavailable, DeadlineExceeded: its device does not answer.
    """
    if observed.attachment is None:
        raise FailedPrecondition(
            f"volume {request.volume_id} is not staged on this node", hint="stage it first"
        )
    device = serving_device(observed.attachment)
    of_device = observed.mounted()
    if request.use.is_block:
        if of_device:
            raise FailedPrecondition(
                f"volume {request.volume_id} is staged as a file system at {of_device[0].mount_point}",
                hint="unstage it before publishing it as a raw device",
            )
        return str(device.path)
    top = mounts.top_mount(observed.mounts, request.staging_path)
    if top is None or top not in of_device:
        raise FailedPrecondition(
            f"volume {request.volume_id} is not mounted at {request.staging_path}", hint="stage it first"
        )
    if top.is_write_protected and not request.wants_read_only:
        raise FailedPrecondition(
            f"the file system at {request.staging_path} is read-only",
            hint="if it was staged writable, it met I/O errors: read the kernel log, unstage, stage again",
        )
    await file_system_usage(request.staging_path)
    return request.staging_path


def refuse_second_workload(observed: Observed, request: PublishRequest) -> None:
    """Keep SINGLE_NODE_SINGLE_WRITER's promise: one target path at a time."""
    if request.use.mode is not AccessMode.SINGLE_NODE_SINGLE_WRITER:
        return
    others = [m.mount_point for m in observed.uses() if m.mount_point not in _own_paths(request)]
    if others:
        raise FailedPrecondition(
            f"volume {request.volume_id} is published at {others[0]}; SINGLE_NODE_SINGLE_WRITER allows one",
            hint="unpublish it there first",
        )


def is_published(observed: Observed, request: PublishRequest) -> bool:
    """Tell whether the volume is at the target path as asked for.

    Raises:
        AlreadyExists: it is there, but writable instead of read-only or the reverse.
    """
    top = mounts.top_mount(observed.mounts, request.target_path)
    # What is not the volume's was stale, and has been taken off.
    if top is None or top not in observed.uses():
        return False
    if top.read_only != request.wants_read_only:
        mode = "read-only" if top.read_only else "writable"
        raise AlreadyExists(
            f"the volume is published {mode} at {request.target_path}", hint="unpublish it first"
        )
    return True


def prepare_target(path: str, *, is_directory: bool, undo: AsyncExitStack) -> None:
    """Make what a bind mount needs below it: an empty directory, or an empty file for a device node.

    Raises:
        FailedPrecondition: something of the other kind is there.
    """
    target = Path(path)
    kind = "a directory" if is_directory else "a regular file"
    if target.is_symlink() or (
        target.exists() and not (target.is_dir() if is_directory else target.is_file())
    ):
        raise FailedPrecondition(f"target path {path} is there, but not {kind}", hint="remove it, then retry")
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    if is_directory:
        target.mkdir(mode=0o750)
    else:
        target.touch(mode=0o600, exist_ok=False)

    def remove() -> None:
        with contextlib.suppress(OSError):
            target.rmdir() if is_directory else target.unlink()

    undo.callback(remove)


def _own_paths(request: PublishRequest) -> tuple[str, str]:
    return request.staging_path, request.target_path
