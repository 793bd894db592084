"""NodeGetVolumeStats and NodeGetVolumeHealth: answers in bounded time, whatever the device does."""

from __future__ import annotations

from dataclasses import dataclass

from csi_vduse.errors import DeadlineExceeded, NotFound, Unavailable
from csi_vduse.node import mounts
from csi_vduse.node.context import NodeContext, Observed, find_volume, look
from csi_vduse.node.health import NOT_ANSWERING, Finding, findings
from csi_vduse.node.usage import Usage, file_system_usage


@dataclass(frozen=True)
class Stats:
    """What a volume's user wants to know.

    Args:
        usage: of the file system; None if it did not answer or the volume is raw.
        block_bytes: capacity of a raw volume; None for a mounted one.
        findings: what is wrong; empty if healthy.
    """

    usage: Usage | None
    block_bytes: int | None
    findings: tuple[Finding, ...]


async def volume_stats(node: NodeContext, volume_id: str, volume_path: str) -> Stats:
    """Measure a published or staged volume.

    Args:
        node: what to work with.
        volume_id: the volume.
        volume_path: where it is, as check_path returns it.

    Raises:
        NotFound: no such volume, or it is not at that path.
    """
    observed = await _known(node, volume_id)
    mount = mounts.top_mount(observed.mounts, volume_path)
    if observed.attachment is None or mount is None or mount not in observed.uses():
        raise NotFound(f"volume {volume_id} is not at {volume_path}")
    wrong = findings(observed)
    if mount not in observed.mounted():
        return Stats(None, observed.attachment.spec.capacity_bytes, wrong)
    try:
        return Stats(await file_system_usage(volume_path), None, wrong)
    except (DeadlineExceeded, Unavailable):
        return Stats(None, None, (*wrong, NOT_ANSWERING))


async def volume_health(node: NodeContext, volume_id: str) -> tuple[Finding, ...]:
    """Say what is wrong with a volume on this node.

    Raises:
        NotFound: no such volume.
    """
    return findings(await _known(node, volume_id))


async def _known(node: NodeContext, volume_id: str) -> Observed:
    if await find_volume(node, volume_id) is None:
        raise NotFound(f"volume {volume_id!r} does not exist")
    return await look(node, volume_id)
