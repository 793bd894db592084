"""Where the agent keeps what it knows of its attachments: RUN_DIR/volumes/DEVICE/, on tmpfs.

A directory per attachment: record.json (written before acts), control.sock (the worker listens there),
next.sock (until it serves, the worker of a handover listens there),
inflight.log (what it has in flight, for the worker that comes after it). tmpfs, because everything in it is
about this boot: devices and workers do not survive one either.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from csi_vduse import records
from csi_vduse.agent.model import Attachment, attachment_from_json, attachment_to_json

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_RECORD = "record.json"
_CONTROL = "control.sock"
_NEXT_CONTROL = "next.sock"
_INFLIGHT = "inflight.log"


@dataclass(frozen=True)
class Store:
    """The records of one agent.

    Args:
        directory: RUN_DIR/volumes.
    """

    directory: Path

    def control_path(self, device_name: str) -> Path:
        """Where the worker of a device listens."""
        return self.directory / device_name / _CONTROL

    def next_control_path(self, device_name: str) -> Path:
        """Where the new worker of a handover listens before it takes the old one's place."""
        return self.directory / device_name / _NEXT_CONTROL

    def inflight_path(self, device_name: str) -> Path:
        """Where the in-flight log of a device is."""
        return self.directory / device_name / _INFLIGHT

    def save(self, attachment: Attachment) -> None:
        """Write the attachment's record."""
        record = {"boot_id": _boot_id(), **attachment_to_json(attachment)}
        records.write_record(self.directory / attachment.device_name / _RECORD, record)

    def forget(self, device_name: str) -> None:
        """Remove everything that is kept about a device, the record last; fine if there is nothing."""
        directory = self.directory / device_name
        if not directory.is_dir():
            return
        for entry in directory.iterdir():
            if entry.name != _RECORD:
                entry.unlink()
        records.delete_record(directory / _RECORD)
        shutil.rmtree(directory, ignore_errors=True)

    def find(self, device_name: str) -> Attachment | None:
        """Return the attachment that the record of a device describes, or None.

        Raises:
            DataLoss: the record is damaged.
        """
        record = records.read_record(self.directory / device_name / _RECORD)
        return attachment_from_json(record) if record is not None else None

    def is_of_this_boot(self, device_name: str) -> bool:
        """Whether the record of a device was written in this boot, or does not say; DataLoss as `find`."""
        record = records.read_record(self.directory / device_name / _RECORD)
        return record is None or record.get("boot_id", _boot_id()) == _boot_id()

    def names(self) -> list[str]:
        """Names of all devices about which anything is kept."""
        return sorted(entry.name for entry in self.directory.iterdir()) if self.directory.is_dir() else []


def _boot_id() -> str:
    return _BOOT_ID.read_text().strip()
