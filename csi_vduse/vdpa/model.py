"""Values of the vDPA bus: which driver a device is given to, and what came out of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path


class Bus(StrEnum):
    """The vDPA bus driver a device is bound to; the value is the driver's name in sysfs."""

    VIRTIO = "virtio_vdpa"
    VHOST = "vhost_vdpa"


@dataclass(frozen=True)
class BusDevice:
    """What a bound device is to its user: a disk or an interface (virtio_vdpa), or a character device (vhost_vdpa).

    Args:
        path: below /dev; of an interface below /sys/class/net.
        major: device number, major part; 0 of an interface.
        minor: device number, minor part.
    """

    path: Path
    major: int = 0
    minor: int = 0
