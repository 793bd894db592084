"""Sees processors go offline, and takes the interrupts of volumes elsewhere; see vdpa/interrupts.py for why at once."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable

from csi_vduse import log
from csi_vduse.vdpa import interrupts
from csi_vduse.vdpa.sysfs import Sysfs

_NETLINK_KOBJECT_UEVENT = 15
_FROM_KERNEL = 1  # group: of the kernel itself, not of udev
_OFFLINE = b"offline@/devices/system/cpu/"
_EVENT_BYTES = 8192


class Processors:
    """Watches until closed.

    Args:
        sysfs: where to look.
        names: of the devices of now.
    """

    def __init__(self, sysfs: Sysfs, names: Callable[[], Iterable[str]]) -> None:
        self._sysfs = sysfs
        self._names = names
        self._socket = socket.socket(
            socket.AF_NETLINK,
            socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK,
            _NETLINK_KOBJECT_UEVENT,
        )
        self._socket.bind((0, _FROM_KERNEL))
        asyncio.get_running_loop().add_reader(self._socket, self._heard)
        self.repair()  # what went while nobody watched

    def close(self) -> None:
        """Stop watching."""
        asyncio.get_running_loop().remove_reader(self._socket)
        self._socket.close()

    def repair(self) -> None:
        """Have no queue wait for a processor that is offline."""
        if repaired := interrupts.repair(self._sysfs, self._names()):
            log.get().warning(
                "interrupts go to another processor: theirs is offline", devices=sorted(set(repaired))
            )

    def _heard(self) -> None:
        try:
            event = self._socket.recv(_EVENT_BYTES)
        except BlockingIOError:
            return
        except OSError:
            # More came than there was room for (ENOBUFS): something of ours may have been among it.
            event = _OFFLINE
        if event.startswith(_OFFLINE):
            self.repair()
