"""Giving a VDUSE device to a bus driver and taking it back.

Order of attach: DEV_NEW with autoprobe off → driver_override → bind → find the disk or the character device.
Order of detach: unbind → wait until the driver has let go → DEV_DEL. DEV_NEW and DEV_DEL therefore meet an unbound
device and hold the machine-wide vDPA lock for a moment only; what can hang (probe, removal, both served by the worker)
happens in bind and unbind, which lock this device alone, and in a process with a deadline.

A VM's disk is never seen by the host's block layer: between DEV_NEW and bind the device has no driver.
"""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

from csi_vduse import log
from csi_vduse.errors import CommandFailed, DeadlineExceeded, FailedPrecondition, VduseError
from csi_vduse.run import run
from csi_vduse.vdpa.model import Bus, BusDevice
from csi_vduse.vdpa.sysfs import Sysfs

_POLL_S = 0.02


class Netlink(Protocol):
    """What the bus needs of the netlink helper."""

    async def add(self, name: str, driver: str, *, timeout_s: float) -> None:
        """Put a VDUSE device on the bus, unbound, reserved for a driver."""

    async def remove(self, name: str, *, timeout_s: float) -> None:
        """Take a device off the bus."""


class VdpaBus:
    """The vDPA bus of this machine.

    Args:
        netlink: the helper that speaks netlink.
        sysfs: where to look.
    """

    def __init__(self, netlink: Netlink, sysfs: Sysfs) -> None:
        self._netlink = netlink
        self.sysfs = sysfs

    async def attach(self, name: str, bus: Bus, *, timeout_s: float) -> BusDevice:
        """Bind the VDUSE device `name`, whose worker is serving, and return what users open.

        timeout_s bounds each step that can hang. If any step fails the device is off the bus again.

        Raises:
            FailedPrecondition: the bus driver is not loaded, or the device is not ready.
            AlreadyExists: the name is on the bus already.
            DeadlineExceeded: a step hung.
        """
        if not self.sysfs.has_driver(bus):
            raise FailedPrecondition(f"the vDPA bus driver {bus} is not loaded", hint=f"modprobe {bus}")
        await self._netlink.add(name, bus.value, timeout_s=timeout_s)
        try:
            await self._write(self._driver_file(bus.value, "bind"), name, timeout_s)
            return await self._wait_for_device(name, bus, timeout_s)
        except BaseException:
            try:
                await self.detach(name, timeout_s=timeout_s)
            except VduseError as error:
                log.get().error(
                    "device stays on the vDPA bus after a failed attach", device=name, error=str(error)
                )
            raise

    async def detach(self, name: str, *, timeout_s: float) -> None:
        """Take the device off the bus; fine if it is not on it. Its worker must serve, and nobody may use it.

        Raises:
            DeadlineExceeded: a step hung; calling again continues.
        """
        if not self.sysfs.vdpa_exists(name):
            return
        driver = self.sysfs.driver(name)
        if driver is not None:
            try:
                await self._write(self._driver_file(driver, "unbind"), name, timeout_s)
            except CommandFailed:
                # Somebody else unbound it in between: that is what we wanted.
                if self.sysfs.driver(name) is not None:
                    raise
        await self._wait_until_free(name, timeout_s)
        await self._netlink.remove(name, timeout_s=timeout_s)

    async def _wait_until_free(self, name: str, timeout_s: float) -> None:
        """Wait for an unbind that somebody began: DEV_DEL would wait for it too, with the machine-wide lock."""
        deadline = time.monotonic() + timeout_s
        while self.sysfs.is_held_by_driver(name):
            if time.monotonic() > deadline:
                raise DeadlineExceeded(
                    f"the driver of {name} has not let go of it within {timeout_s:g} s",
                    hint="see the kernel log",
                )
            await asyncio.sleep(_POLL_S)

    async def _wait_for_device(self, name: str, bus: Bus, timeout_s: float) -> BusDevice:
        """Wait for what the driver makes: there at once, or later if virtio_blk is loaded on demand."""
        deadline = time.monotonic() + timeout_s
        while True:
            device = self.sysfs.find(name, bus)
            if device is not None and device.path.exists():
                return device
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(_POLL_S)
        if device is not None:
            raise FailedPrecondition(f"{device.path} does not exist", hint="/dev must be the host's devtmpfs")
        what = "disk or interface" if bus is Bus.VIRTIO else "character device"
        raise DeadlineExceeded(
            f"{bus} made no {what} of {name} within {timeout_s:g} s",
            hint="see the kernel log; is virtio_blk loaded, or virtio_net?",
        )

    def _driver_file(self, driver: str, name: str) -> Path:
        return self.sysfs.bus_dir / "drivers" / driver / name

    async def _write(self, path: Path, value: str, timeout_s: float) -> None:
        # `tee` because the write can hang: a process can be killed, a thread cannot.
        await run(["tee", str(path)], stdin=value.encode(), timeout_s=timeout_s)
