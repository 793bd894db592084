"""A kernel with VDUSE and a vDPA bus, for tests of attach and detach: a tree of files that looks like sysfs.

Honest: it refuses what the real one refuses. A name is created once (EEXIST); a device has one opener, until
the last descriptor of that opening is closed, wherever it was sent (EBUSY); a device that is open or on the
bus cannot be destroyed (EBUSY); bounce_size is fixed once a device was on the bus (EPERM); a device that no
worker has cannot join the bus, and leaves it only if it is broken. tests/vm/test_agent.py tries the same on the real
one.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.errors import AlreadyExists, FailedPrecondition, Unavailable, VduseError
from csi_vduse.vdpa.model import Bus, BusDevice
from csi_vduse.vdpa.sysfs import Roots, Sysfs

SECTOR_BYTES = 512


@dataclass
class FakeDevice:
    spec: DeviceSpec
    attributes: dict[str, int] = field(default_factory=dict)
    was_on_bus: bool = False
    broken: bool = False


@dataclass
class FakeKernel:
    """Kernel and BusBinder in one; `fail` makes the named step raise."""

    root: Path
    devices: dict[str, FakeDevice] = field(default_factory=dict)
    fail: dict[str, Exception] = field(default_factory=dict)
    steps: list[str] = field(default_factory=list)
    refusal: str = ""
    during_bus_attach: Callable[[], Awaitable[None]] | None = None

    def __post_init__(self) -> None:
        for driver in Bus:
            (self.root / "sys/bus/vdpa/drivers" / driver).mkdir(parents=True)
        for directory in (
            "sys/bus/vdpa/devices",
            "sys/class/vduse/control",
            "dev/vduse",
            "proc/1",
            "proc/self",
        ):
            (self.root / directory).mkdir(parents=True)
        (self.root / "dev/vduse/control").touch()

    @property
    def sysfs(self) -> Sysfs:
        return Sysfs(Roots(self.root / "sys", self.root / "dev", self.root / "proc"))

    def on_bus(self, name: str) -> Path:
        return self.root / "sys/bus/vdpa/devices" / name

    def problem(self) -> str:
        return self.refusal

    async def create(self, spec: DeviceSpec) -> None:
        self._step("create")
        if spec.name in self.devices:
            raise AlreadyExists(f"VDUSE device {spec.name!r} exists already")
        self.devices[spec.name] = FakeDevice(spec)
        (self.root / "sys/class/vduse" / spec.name).mkdir()
        (self.root / "dev/vduse" / spec.name).touch()

    async def destroy(self, name: str) -> None:
        self._step("destroy")
        if name not in self.devices:
            return
        deadline = time.monotonic() + 2
        while (self.on_bus(name).exists() or self.is_open(name)) and time.monotonic() < deadline:
            await asyncio.sleep(0.01)  # as VduseKernel does
        if self.on_bus(name).exists() or self.is_open(name):
            raise FailedPrecondition(f"VDUSE device {name!r} is still on the vdpa bus or open")
        del self.devices[name]
        (self.root / "sys/class/vduse" / name).rmdir()
        (self.root / "dev/vduse" / name).unlink()

    def open(self, name: str) -> int:
        self._step("open")
        fd = os.open(self.root / "dev/vduse" / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            raise Unavailable(f"VDUSE device {name!r} is open in another process") from None
        return fd

    def is_open(self, name: str) -> bool:
        fd = os.open(self.root / "dev/vduse" / name, os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(fd)
        return False

    def set_attribute(self, name: str, attribute: str, value: int) -> None:
        self._step(attribute)
        device = self.devices[name]
        if attribute == "bounce_size" and device.was_on_bus:
            raise VduseError("writing bounce_size failed: Operation not permitted")
        device.attributes[attribute] = value

    async def attach(self, name: str, bus: Bus, *, timeout_s: float) -> BusDevice:
        assert timeout_s > 0
        self._step("bus attach")
        if self.on_bus(name).exists():
            raise AlreadyExists(f"a vDPA device named {name!r} exists that is not ours")
        if not self.is_open(name):
            raise FailedPrecondition("no worker has set the queues up")
        if self.during_bus_attach is not None:
            await self.during_bus_attach()
        self.devices[name].was_on_bus = True
        directory = self.on_bus(name)
        directory.mkdir()
        (directory / "driver").symlink_to(self.root / "sys/bus/vdpa/drivers" / bus)
        if bus is Bus.VHOST:
            return self._appear(directory / "vhost-vdpa-0", 236)
        block = directory / "virtio0/block/vda"
        block.mkdir(parents=True)
        (block / "inflight").write_text("       0        0\n")
        self.show_capacity(name, self.devices[name].spec.capacity_bytes)
        return self._appear(block, 254)

    async def detach(self, name: str, *, timeout_s: float) -> None:
        assert timeout_s > 0
        self._step("bus detach")
        directory = self.on_bus(name)
        if not directory.exists():
            return
        if not self.is_open(name) and not self.devices[name].broken:
            raise AssertionError("unbound without a worker: the real kernel would hang here")
        for path in sorted(directory.rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        directory.rmdir()

    def show_capacity(self, name: str, capacity_bytes: int) -> None:
        for block in self.on_bus(name).glob("virtio*/block/*"):
            (block / "size").write_text(f"{capacity_bytes // SECTOR_BYTES}\n")

    def put_in_flight(self, name: str, reads: int, writes: int) -> None:
        for block in self.on_bus(name).glob("virtio*/block/*"):
            (block / "inflight").write_text(f"{reads:8} {writes:8}\n")

    def mount(self, where: str) -> None:
        """Make both mount tables show the one disk there is."""
        line = f"36 35 254:0 / {where} rw,noatime - ext4 /dev/vda rw\n"
        for process in ("1", "self"):
            (self.root / "proc" / process / "mountinfo").write_text(line)

    def _appear(self, directory: Path, major: int) -> BusDevice:
        directory.mkdir(exist_ok=True)
        (directory / "dev").write_text(f"{major}:0\n")
        return BusDevice(self.root / "dev" / directory.name, major, 0)

    def _step(self, name: str) -> None:
        self.steps.append(name)
        if name in self.fail:
            raise self.fail[name]
