"""Which uses of a volume are possible: the access-mode policy, as a pure function and a table.

A file or qsd pool belongs to one node, so every mode that names several nodes is refused: a volume that is
ReadWriteMany on paper and usable on one node only would deceive the scheduler. A volume of an nbd pool goes to
any node: to many that only read, to one that writes, and as a raw block device to two, the source and the
target of a VM's migration (a file system on two nodes would be destroyed). A device on the vhost_vdpa
bus is a VM's disk and has no block device on the host, so nothing can mount it. docs/parameters.md shows the
table.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from csi_vduse.vdpa.model import Bus

FILESYSTEMS = ("ext4", "xfs", "btrfs")
DEFAULT_FILESYSTEM = "ext4"


class AccessMode(Enum):
    """CSI access modes by their names in the specification."""

    SINGLE_NODE_WRITER = 1
    SINGLE_NODE_READER_ONLY = 2
    MULTI_NODE_READER_ONLY = 3
    MULTI_NODE_SINGLE_WRITER = 4
    MULTI_NODE_MULTI_WRITER = 5
    SINGLE_NODE_SINGLE_WRITER = 6
    SINGLE_NODE_MULTI_WRITER = 7


@dataclass(frozen=True)
class Use:
    """How a volume is to be used.

    Args:
        mode: by whom.
        filesystem: type to mount, or None for a raw block device.
        mount_flags: options for the mount; may hold secrets, never logged.
    """

    mode: AccessMode
    filesystem: str | None
    mount_flags: tuple[str, ...] = ()

    @property
    def is_block(self) -> bool:
        """True for a raw block device."""
        return self.filesystem is None


READER_MODES = frozenset({AccessMode.SINGLE_NODE_READER_ONLY, AccessMode.MULTI_NODE_READER_ONLY})
_ONE_NODE = frozenset(
    {
        AccessMode.SINGLE_NODE_WRITER,
        AccessMode.SINGLE_NODE_READER_ONLY,
        AccessMode.SINGLE_NODE_SINGLE_WRITER,
        AccessMode.SINGLE_NODE_MULTI_WRITER,
    }
)
# Backend kind → modes that it can honour.
_MODES: dict[str, frozenset[AccessMode]] = {
    "file": _ONE_NODE,
    "qsd": _ONE_NODE,
    "nbd": _ONE_NODE | {AccessMode.MULTI_NODE_READER_ONLY, AccessMode.MULTI_NODE_MULTI_WRITER},
}


def is_shared(backend: str) -> bool:
    """Tell whether volumes of a backend can be used from any node, one after the other."""
    return backend == "nbd"


def objection(use: Use, *, backend: str, bus: Bus) -> str:
    """Return why a volume cannot be used so, or an empty text if it can.

    Args:
        use: what is asked.
        backend: kind of the volume's pool.
        bus: the volume's bus.
    """
    allowed = _MODES.get(backend, frozenset())
    if use.mode not in allowed:
        names = ", ".join(sorted(mode.name for mode in allowed))
        return f"access mode {use.mode.name} is not possible with backend {backend!r}; allowed: {names}"
    if use.filesystem is not None and use.mode is AccessMode.MULTI_NODE_MULTI_WRITER:
        return (
            f"access mode {use.mode.name} is possible for raw block only: a file system that two nodes write "
            "is destroyed; use volumeMode: Block (for VMs that migrate), or ReadWriteOnce"
        )
    if use.filesystem is not None and bus is Bus.VHOST:
        return (
            "a volume with bus vhost_vdpa is a VM's disk and cannot be mounted; "
            "use volumeMode: Block, or bus virtio_vdpa"
        )
    if use.filesystem is not None and use.filesystem not in FILESYSTEMS:
        return f"file system {use.filesystem!r} is not supported; allowed: {', '.join(FILESYSTEMS)}"
    return ""
