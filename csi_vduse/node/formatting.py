"""Whether a volume is formatted, and making it so: the one place where data could be overwritten.

Keeps true: mkfs runs only on a device whose content was just proved blank. It is proved blank either because
the volume was never formatted and nothing is on it, or because its record says that our own mkfs was
interrupted (nobody can have used the volume since) and we have wiped it. The record says `formatting` before
the first byte is written and `formatted` after the last, both durable.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto

from csi_vduse import log
from csi_vduse.errors import CommandFailed, DataLoss, FailedPrecondition
from csi_vduse.node.context import NodeContext, update_volume
from csi_vduse.node.filesystems import Filesystem
from csi_vduse.node.probe import Blank, Content, Foreign, Known, probe_content
from csi_vduse.run import run
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, Volume

WIPE_TIMEOUT_S = 600.0


class Step(Enum):
    """What has to be done before the volume can be mounted."""

    NOTHING = auto()
    RECORD = auto()  # a file system came with the content; remember it
    FORMAT = auto()
    WIPE_AND_FORMAT = auto()


def decide(record: FilesystemRecord | None, content: Content, wanted: str, *, read_only: bool) -> Step:
    """Decide from the volume's record and its content; pure.

    Args:
        record: the registry's, or None if the volume was never formatted.
        content: what a probe has just found.
        wanted: file system type asked for.
        read_only: the device cannot be written.

    Raises:
        FailedPrecondition: the volume holds something else, or cannot be formatted.
        DataLoss: record and content contradict each other.
    """
    if record is not None and record.state is FilesystemState.FORMATTING:
        return _only_if_writable(Step.WIPE_AND_FORMAT, read_only=read_only)
    if record is not None:
        if record.type != wanted:
            raise FailedPrecondition(f"the volume is formatted as {record.type}; {wanted} was asked for")
        if content != Known(record.type):
            raise DataLoss(
                f"the volume was formatted as {record.type}, but holds {describe(content)}",
                hint="it is not formatted again; repair it or restore a snapshot",
            )
        return Step.NOTHING
    match content:
        case Blank():
            return _only_if_writable(Step.FORMAT, read_only=read_only)
        case Known(fs_type) if fs_type == wanted:
            return Step.NOTHING if read_only else Step.RECORD
        case Known() | Foreign():
            raise FailedPrecondition(
                f"the volume was never formatted, but holds {describe(content)}; {wanted} was asked for",
                hint="it is not formatted over; use it as a raw block volume, or make a new one",
            )


def describe(content: Content) -> str:
    """Name a content for people."""
    match content:
        case Blank():
            return "nothing but zeros"
        case Known(fs_type):
            return f"a {fs_type} file system"
        case Foreign(description):
            return description


def _only_if_writable(step: Step, *, read_only: bool) -> Step:
    if read_only:
        raise FailedPrecondition(
            "the volume has no file system yet and the access mode is read-only",
            hint="use it once with a writable access mode",
        )
    return step


async def ensure_formatted(
    node: NodeContext,
    volume: Volume,
    device: str,
    filesystem: Filesystem,
    *,
    size_bytes: int,
    read_only: bool,
) -> bool:
    """Bring the volume to where it can be mounted; tells whether a new file system was made.

    Args:
        node: for the registry.
        volume: as the registry has it now.
        device: the volume's disk, proved to be it.
        filesystem: the one asked for.
        size_bytes: of the device.
        read_only: the device cannot be written.

    Raises:
        FailedPrecondition, DataLoss: see decide.
        Unavailable, DeadlineExceeded: the device cannot be read or does not answer.
        CommandFailed: mkfs failed; the next call begins it again.
    """
    content = await probe_content(device, size_bytes)
    step = decide(volume.filesystem, content, filesystem.name, read_only=read_only)
    logger = log.get()
    if step is Step.NOTHING:
        return False
    if step is Step.RECORD:
        logger.info("volume came with a file system", filesystem=filesystem.name)
        await _record(node, volume.id, filesystem, FilesystemState.FORMATTED)
        return False
    if size_bytes < filesystem.min_size_bytes:
        raise FailedPrecondition(
            f"{filesystem.name} needs {filesystem.min_size_bytes} bytes, the volume has {size_bytes}",
            hint="expand the volume, or use another file system",
        )
    await _record(node, volume.id, filesystem, FilesystemState.FORMATTING)
    if step is Step.WIPE_AND_FORMAT:
        logger.warning("an interrupted mkfs is begun again", filesystem=filesystem.name)
        await _wipe(device, size_bytes)
    await filesystem.make(device)
    await _record(node, volume.id, filesystem, FilesystemState.FORMATTED)
    return True


async def _record(node: NodeContext, volume_id: str, filesystem: Filesystem, state: FilesystemState) -> None:
    record = FilesystemRecord(filesystem.name, state)
    await update_volume(node, volume_id, lambda volume: replace(volume, filesystem=record))


async def _wipe(device: str, size_bytes: int) -> None:
    """Zero a whole device and prove it: by discarding if that zeroes, since it is quick and keeps it thin."""
    for options in ([], ["--zeroout"]):
        try:
            await run(["blkdiscard", *options, device], timeout_s=WIPE_TIMEOUT_S)
        except CommandFailed as error:
            log.get().warning("blkdiscard failed", options=options, error=str(error))
            continue
        if await probe_content(device, size_bytes) == Blank():
            return
    raise FailedPrecondition(
        f"{device} could not be wiped for a new mkfs", hint="delete the volume and make it again"
    )
