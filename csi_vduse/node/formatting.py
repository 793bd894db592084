"""Whether a volume is formatted, and making it so: the one place where data could be overwritten.

Keeps true: mkfs runs only on a device whose content was just proved blank. It is proved blank either because
nothing is on it, or because all that is on it is what our own mkfs left that was interrupted, and we have wiped it.
That is believed if both say so: the record, which names the file system that mkfs was to make, and the content, which
has no known mark, or that of just this file system, unfinished and never mounted. What is whole is taken as it is;
about everything else a person decides. The record says `formatting` before the first byte is written and
`formatted` after the last, both durable; who stages the volume raw, and may write anything, has it forgotten before.
"""

from __future__ import annotations

from dataclasses import replace
from enum import Enum, auto
from uuid import uuid4

from csi_vduse import log
from csi_vduse.errors import CommandFailed, DataLoss, FailedPrecondition
from csi_vduse.node.context import NodeContext, update_volume
from csi_vduse.node.filesystems import Filesystem, Making, get_filesystem
from csi_vduse.node.probe import Blank, Content, Foreign, HalfMade, Known, Unrecognised, probe_content
from csi_vduse.run import run
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, Volume

WIPE_TIMEOUT_S = 600.0
_NOT_FORMATTED_OVER = "it is not formatted over; use it as a raw block volume, or make a new one"
_PERHAPS_HALF_MADE = (
    ". If only an interrupted mkfs can have written it, zero it (`blkdiscard --zeroout`) as a raw block volume, or where "
    "it is stored, and stage it again"
)
_A_PERSON_DECIDES = (
    "nothing was changed. To keep what is there, clone the volume: a clone is taken for what its content is. "
    "If it is worth nothing, delete the volume and make it again"
)


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
        content: what a probe has just found; HalfMade only of the file system that the record names.
        wanted: file system type asked for.
        read_only: the device cannot be written.

    Raises:
        FailedPrecondition: the volume holds something else, or cannot be formatted.
        DataLoss: record and content contradict each other.
    """
    if record is not None and record.state is FilesystemState.FORMATTED:
        return _of_formatted(record, content, wanted)
    if record is not None and record.uuid:
        return _of_begun(record, content, wanted, read_only=read_only)
    # A format that was begun without a UUID (by an older release) cannot be told from what came after it.
    match content:
        case Blank():
            return _only_if_writable(Step.FORMAT, read_only=read_only)
        case Known(fs_type) if fs_type == wanted:
            return Step.NOTHING if read_only else Step.RECORD
    known = "was never formatted" if record is None else f"is not known to be formatted as {record.type}"
    raise FailedPrecondition(
        f"the volume {known}, but holds {describe(content)}; {wanted} was asked for",
        hint=_NOT_FORMATTED_OVER + (_PERHAPS_HALF_MADE if isinstance(content, Unrecognised) else ""),
    )


def _of_formatted(record: FilesystemRecord, content: Content, wanted: str) -> Step:
    if record.type != wanted:
        raise FailedPrecondition(f"the volume is formatted as {record.type}; {wanted} was asked for")
    if not isinstance(content, Known) or content.fs_type != record.type:
        raise DataLoss(
            f"the volume was formatted as {record.type}, but holds {describe(content)}",
            hint="it is not formatted again; repair it or restore a snapshot",
        )
    return Step.NOTHING


def _of_begun(record: FilesystemRecord, content: Content, wanted: str, *, read_only: bool) -> Step:
    match content:
        case Blank():
            return _only_if_writable(Step.FORMAT, read_only=read_only)
        case HalfMade() | Unrecognised():
            return _only_if_writable(Step.WIPE_AND_FORMAT, read_only=read_only)
        case Known(fs_type, uuid) if (fs_type, uuid) == (record.type, record.uuid):
            if fs_type != wanted:
                raise FailedPrecondition(f"the volume is formatted as {fs_type}; {wanted} was asked for")
            return Step.NOTHING if read_only else Step.RECORD
    raise DataLoss(
        f"a mkfs for {record.type} with UUID {record.uuid} was interrupted, but the volume holds "
        f"{describe(content)}: somebody has written it since",
        hint=_A_PERSON_DECIDES,
    )


def describe(content: Content) -> str:
    """Name a content for people."""
    match content:
        case Blank():
            return "nothing but zeros"
        case Known(fs_type, uuid):
            return f"a {fs_type} file system" + (f" with UUID {uuid}" if uuid else "")
        case Foreign(description):
            return description
        case Unrecognised(offset_bytes):
            return f"data of no known format at byte {offset_bytes}"
        case HalfMade(fs_type):
            return f"a half-made {fs_type} file system"


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
    content = await examine(volume.filesystem, device, await probe_content(device, size_bytes))
    step = decide(volume.filesystem, content, filesystem.name, read_only=read_only)
    logger = log.get()
    if step is Step.NOTHING:
        return False
    if step is Step.RECORD:
        logger.info("volume came with a file system", filesystem=filesystem.name)
        await _record(node, volume.id, FilesystemRecord(filesystem.name, FilesystemState.FORMATTED))
        return False
    if size_bytes < filesystem.min_size_bytes:
        raise FailedPrecondition(
            f"{filesystem.name} needs {filesystem.min_size_bytes} bytes, the volume has {size_bytes}",
            hint="expand the volume, or use another file system",
        )
    if step is Step.WIPE_AND_FORMAT:
        # Under the record of what is wiped: one that names the next file system would not know the rest of this one.
        logger.warning("an interrupted mkfs is begun again", found=describe(content))
        await _wipe(device, size_bytes)
    uuid = str(uuid4())
    await _record(node, volume.id, FilesystemRecord(filesystem.name, FilesystemState.FORMATTING, uuid))
    await filesystem.make(device, uuid)
    await _record(node, volume.id, FilesystemRecord(filesystem.name, FilesystemState.FORMATTED))
    return True


async def examine(record: FilesystemRecord | None, device: str, content: Content) -> Content:
    """Have a file system's own tools say what our mkfs has left, if that is what the record and a probe say.

    Raises:
        DataLoss: it is neither whole nor unused.
        Unavailable, DeadlineExceeded: the tools could not tell.
    """
    if record is None or record.state is not FilesystemState.FORMATTING or not record.uuid:
        return content
    if content != Known(record.type, record.uuid):
        return content
    match await get_filesystem(record.type).examine(device):
        case Making.WHOLE:
            return content
        case Making.UNFINISHED:
            return HalfMade(record.type, record.uuid)
    raise DataLoss(
        f"a mkfs for {record.type} was interrupted, and what is there is damaged, but may have been used",
        hint=_A_PERSON_DECIDES,
    )


async def forget_begun_format(node: NodeContext, volume: Volume) -> None:
    """Before somebody may write the volume as he likes: what is on it then is no longer what our mkfs left."""
    if volume.filesystem is not None and volume.filesystem.state is FilesystemState.FORMATTING:
        await _record(node, volume.id, None)


async def _record(node: NodeContext, volume_id: str, record: FilesystemRecord | None) -> None:
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
