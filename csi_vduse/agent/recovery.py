"""What an agent does when it starts: look at what earlier ones left, plan, carry the plan out.

`observe` reads records, sysfs and sockets, `plan` decides (pure; its table is tests/unit/agent/test_recovery_plan.py),
recover.py acts. `csi-vduse doctor --plan` prints the plan and does nothing.

Kept true:
- Everything that is ours is named by a record, or is collected: nothing leaks. What may be somebody else's, or is
  recorded in a way that this release does not read, is reported and not touched.
- Nothing of an earlier boot is believed: neither devices nor workers survive one.
- A device that may have requests waiting is never destroyed here. The kernel itself refuses that for one that is
  open or on the bus.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from csi_vduse.agent.model import Attachment, State
from csi_vduse.agent.store import Store
from csi_vduse.errors import DataLoss
from csi_vduse.vdpa.sysfs import Sysfs

_DIGEST_NAME = re.compile(r"vol-[0-9a-f]{16}")  # what model.device_name makes of most ids; few others would


@dataclass(frozen=True)
class Observed:
    """One name, as records and kernel have it.

    Args:
        name: of the device, and of the directory with its record.
        record: what is recorded, or None.
        unreadable: why a record that is there cannot be read; empty if there is none or it can.
        this_boot: whether the record was written in this boot.
        exists: whether the VDUSE device does.
        on_bus: whether it is on the vDPA bus.
        has_directory: whether anything is kept about it.
    """

    name: str
    record: Attachment | None = None
    unreadable: str = ""
    this_boot: bool = True
    exists: bool = False
    on_bus: bool = False
    has_directory: bool = True


@dataclass(frozen=True)
class Adopt:
    """Take an attached volume over: its worker, or if none serves, another one."""

    attachment: Attachment

    def __str__(self) -> str:
        return f"adopt volume {self.attachment.volume_id}, and revive its worker if none serves"


@dataclass(frozen=True)
class Finish:
    """Detach what is half attached or half detached."""

    attachment: Attachment

    def __str__(self) -> str:
        how = "by force " if self.attachment.forced else ""
        return f"detach volume {self.attachment.volume_id} {how}(it is {self.attachment.state})"


@dataclass(frozen=True)
class Forget:
    """Remove records, sockets and log of a device that does not exist, and end who still listens there."""

    name: str
    why: str

    def __str__(self) -> str:
        return f"forget {self.name}: {self.why}"


@dataclass(frozen=True)
class Destroy:
    """Destroy a device that nobody has recorded; the kernel refuses if it is in use."""

    name: str

    def __str__(self) -> str:
        return f"destroy device {self.name}: it has no record, and is not on the bus"


@dataclass(frozen=True)
class Report:
    """Do nothing but say what is wrong."""

    name: str
    problem: str

    def __str__(self) -> str:
        return f"leave {self.name} alone: {self.problem}"


Step = Adopt | Finish | Forget | Destroy | Report


def observe(store: Store, sysfs: Sysfs) -> list[Observed]:
    """Look at everything that may be ours; changes nothing, and waits for nobody."""
    devices, on_bus, kept = set(sysfs.vduse_names()), set(sysfs.vdpa_names()), set(store.names())
    found = []
    for name in sorted(devices | kept):
        record, unreadable, this_boot = None, "", True
        try:
            record = store.find(name)
            this_boot = store.is_of_this_boot(name)
        except DataLoss as error:
            unreadable = str(error)
        found.append(
            Observed(name, record, unreadable, this_boot, name in devices, name in on_bus, name in kept)
        )
    return found


def plan(observed: list[Observed]) -> list[Step]:
    """Return what is to be done, in order."""
    return [step for each in observed if (step := _step(each)) is not None]


def _step(seen: Observed) -> Step | None:
    if seen.unreadable:
        return Report(seen.name, seen.unreadable)
    if seen.record is not None:
        return _recorded(seen, seen.record)
    if not seen.exists:
        return Forget(seen.name, "there is neither record nor device") if seen.has_directory else None
    if not _DIGEST_NAME.fullmatch(seen.name):
        return None  # of somebody else, for all we know
    if seen.on_bus:
        return Report(
            seen.name,
            "it is on the bus and has no record here; its requests wait unless another agent serves it. If none "
            "does, free its users, then: vdpa dev del",
        )
    return Destroy(seen.name)


def _recorded(seen: Observed, record: Attachment) -> Step:
    if not seen.this_boot:
        return Forget(seen.name, "its record is of an earlier boot")
    if not seen.exists:
        return Forget(seen.name, "its device does not exist any more")
    return Adopt(record) if record.state is State.ATTACHED else Finish(record)
