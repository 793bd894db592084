"""The in-flight log of a device: one file on tmpfs that outlives workers, with a part for each queue.

A head page says whose log it is; behind it are the queues' parts, which the engine writes (src/inflight.h). A worker
that takes a device over from a dead one reads there what that one had taken from the rings and not returned.

Kept true: a log is used only for the device that it was made for, in the boot and with the features in which it was
written; anything else is an error and never a guess. The file is made anew for each device and belongs to the agent.
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from csi_vduse import __version__
from csi_vduse.dataplane.engine import inflight_bytes
from csi_vduse.dataplane.vhost_user.protocol import Inflight
from csi_vduse.errors import DataLoss

VERSION: Final = 1  # in which logs are made
READABLE: Final = frozenset({1})  # and those that a predecessor may have left
_HEAD_BYTES: Final = 4096
# Of a queue's part: the fields before its entries, the version among them, which is never 0 (src/inflight.h).
_PART_HEAD_BYTES: Final = 16
# Negotiated features: in the head, but not of its text, because they are known only when a driver is there.
_FEATURES: Final = struct.Struct("=Q")
_FEATURES_AT: Final = _HEAD_BYTES - _FEATURES.size
_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class LogIdentity:
    """Whose log it is.

    Args:
        boot_id: of the kernel.
        instance: its number of the device's sysfs folder, which no two devices share.
        queues: that the device has.
        queue_size: of each, at most.
        server: a vhost-user server keeps it, of split rings; not the engine.
    """

    boot_id: str
    instance: int
    queues: int
    queue_size: int
    server: bool = False

    @classmethod
    def of(cls, device: Path, *, queues: int, queue_size: int, server: bool) -> LogIdentity:
        """Return the identity of the device whose sysfs folder this is."""
        return cls(_BOOT_ID.read_text().strip(), device.stat().st_ino, queues, queue_size, server)

    @property
    def part_bytes(self) -> int:
        """How large a queue's part is, whatever format its driver chooses; a server finds it by its own computing."""
        return max(inflight_bytes(self.queue_size, packed=packed) for packed in {False, not self.server})

    @property
    def place(self) -> Inflight:
        """Where the parts are, for a server that keeps the log."""
        return Inflight(self.queues * self.part_bytes, _HEAD_BYTES, self.queues, self.queue_size, 0)

    def to_json(self) -> dict[str, Any]:
        """Encode; LogIdentity(**value) decodes. What earlier releases do not know is there only where it is so."""
        value = asdict(self)
        if not self.server:
            del value["server"]
        return value


def create(path: Path, identity: LogIdentity) -> None:
    """Make the log of a device that was just made; the folder is the agent's, so nobody else can have made it.

    Raises:
        FileExistsError: there is one.
    """
    head = json.dumps({"version": VERSION, **identity.to_json()}).encode()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, _HEAD_BYTES + identity.queues * identity.part_bytes)
        os.pwrite(fd, head, 0)
    finally:
        os.close(fd)


class InflightLog:
    """A log that is mapped; the descriptor stays the caller's.

    Args:
        fd: of the file.
        identity: what the device is.

    Raises:
        DataLoss: it is no log, of another version, or not of this device.
    """

    def __init__(self, fd: int, identity: LogIdentity) -> None:
        head = os.pread(fd, _FEATURES_AT, 0).rstrip(b"\0")
        try:
            found = json.loads(head)
        except ValueError as error:
            raise DataLoss("the in-flight log is damaged") from error
        version = found.get("version") if isinstance(found, dict) else None
        if version not in READABLE:
            raise DataLoss(
                f"the in-flight log is of version {version}, and this is csi-vduse {__version__}, which does not read it",
                hint="another release made the volume's device: serve it with that one, or detach it there first",
            )
        wanted = {"version": version, **identity.to_json()}
        if found != wanted:
            raise DataLoss(
                f"the in-flight log is not of this device: {found} instead of {wanted}",
                hint="requests of the dead worker cannot be replayed; see docs/recovery.md",
            )
        size_bytes = _HEAD_BYTES + identity.queues * identity.part_bytes
        if os.fstat(fd).st_size != size_bytes:
            raise DataLoss(f"the in-flight log does not have the {size_bytes} bytes of its geometry")
        self._part_bytes = identity.part_bytes
        # Never unmapped: requests that were abandoned are noted in it until the process ends.
        self._map = mmap.mmap(fd, size_bytes)

    @property
    def features(self) -> int:
        """Features in which the log is written; 0 if no driver was ever served."""
        return int(_FEATURES.unpack_from(self._map, _FEATURES_AT)[0])

    def begin(self, features: int) -> None:
        """Make all parts empty: a driver begins with these features, and nothing is in flight."""
        _FEATURES.pack_into(self._map, _FEATURES_AT, 0)
        self._map[_HEAD_BYTES:] = bytes(len(self._map) - _HEAD_BYTES)
        _FEATURES.pack_into(self._map, _FEATURES_AT, features)

    def check(self, features: int) -> None:
        """Refuse a driver with other features than the log is written in.

        Raises:
            DataLoss: they differ.
        """
        if self.features not in (0, features):
            raise DataLoss(
                f"the in-flight log was written with features {self.features:#x}, the driver has {features:#x}"
            )

    def was_begun(self, index: int) -> bool:
        """Whether a queue was served, or at least begun, since the driver began; its part is blank otherwise."""
        return any(self.part(index)[:_PART_HEAD_BYTES])

    def part(self, index: int) -> memoryview:
        """Return a queue's part."""
        start = _HEAD_BYTES + index * self._part_bytes
        return memoryview(self._map)[start : start + self._part_bytes]
