"""What is wrong with a volume on this node, from the agent's word and the mount table; pure.

The same findings answer NodeGetVolumeHealth (CSI 1.13) and the volume condition of 1.12.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from csi_vduse.agent.model import Attachment, State
from csi_vduse.node.context import Observed


class Severity(Enum):
    """CSI's kinds of trouble that we can tell apart, by their names in the specification."""

    DEGRADED = 1
    INACCESSIBLE = 2


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Args:
        severity: how bad.
        reason: CamelCase word for programs, one for each kind of trouble.
        message: sentence for people.
    """

    severity: Severity
    reason: str
    message: str


NOT_ANSWERING = Finding(
    Severity.INACCESSIBLE, "FilesystemNotAnswering", "The file system did not answer within its deadline."
)


def findings(observed: Observed) -> tuple[Finding, ...]:
    """Return what is wrong with the volume; empty if it is healthy."""
    attachment = observed.attachment
    if attachment is None:
        return (Finding(Severity.INACCESSIBLE, "NotAttached", "The volume has no device on this node."),)
    found = [] if attachment.state in _NORMAL else [_device_finding(attachment)]
    lost = [mount for mount in observed.mounted() if mount.is_write_protected]
    if lost and not attachment.spec.read_only:
        message = f"The file system at {lost[0].mount_point} is read-only; it was staged writable."
        found.append(Finding(Severity.DEGRADED, "FilesystemReadOnly", message))
    return tuple(found)


_NORMAL = frozenset({State.ATTACHING, State.ATTACHED, State.DETACHING})
_REASONS = {
    State.WORKER_DEAD: ("WorkerDead", "The worker of the volume is dead; its I/O waits."),
    State.STALLED: ("Stalled", "The volume has had no worker for long; its I/O waits."),
    State.BROKEN: ("DeviceBroken", "The kernel has given the volume's device up."),
}


def _device_finding(attachment: Attachment) -> Finding:
    reason, message = _REASONS[attachment.state]
    if attachment.state_reason:
        message += f" {attachment.state_reason}"
    return Finding(Severity.INACCESSIBLE, reason, message)
