"""Reading the kernel's state, from a tree that looks like sysfs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.errors import FailedPrecondition
from csi_vduse.vdpa.bus import VdpaBus
from csi_vduse.vdpa.model import Bus, BusDevice
from csi_vduse.vdpa.sysfs import Roots, Sysfs
from tests.unit.fakes.kernel import FakeKernel


@pytest.fixture
def kernel(tmp_path: Path) -> FakeKernel:
    return FakeKernel(tmp_path)


async def attached(kernel: FakeKernel, bus: Bus) -> BusDevice:
    await kernel.create(DeviceSpec(name="v", capacity_bytes=1 << 20))
    kernel.open("v")
    return await kernel.attach("v", bus, timeout_s=1)


async def test_a_disk_is_found_with_its_numbers_driver_and_size(kernel: FakeKernel):
    device = await attached(kernel, Bus.VIRTIO)
    sysfs = kernel.sysfs
    assert sysfs.find("v", Bus.VIRTIO) == device == BusDevice(kernel.root / "dev/vda", 254, 0)
    assert sysfs.find("v", Bus.VHOST) is None
    assert sysfs.driver("v") == "virtio_vdpa"
    assert (sysfs.vduse_names(), sysfs.vdpa_names()) == (["v"], ["v"])
    assert sysfs.disk_capacity_bytes("v") == 1 << 20


async def test_a_vms_device_is_found_and_is_no_disk(kernel: FakeKernel):
    device = await attached(kernel, Bus.VHOST)
    assert kernel.sysfs.find("v", Bus.VHOST) == device
    assert kernel.sysfs.requests_in_flight("v") is None
    assert kernel.sysfs.disk_capacity_bytes("v") is None


def test_a_kernel_without_any_of_it_has_no_devices(tmp_path: Path):
    sysfs = Sysfs(Roots(tmp_path, tmp_path, tmp_path))
    assert (sysfs.vduse_names(), sysfs.vdpa_names(), sysfs.driver("v")) == ([], [], None)
    assert not sysfs.has_driver(Bus.VIRTIO)


async def test_holders_and_mounts_of_partitions_count(kernel: FakeKernel):
    await attached(kernel, Bus.VIRTIO)
    part = kernel.on_bus("v") / "virtio0/block/vda/vda1"
    (part / "holders/dm-0").mkdir(parents=True)
    (part / "dev").write_text("254:1\n")
    line = "40 35 254:1 / /mnt/part rw - ext4 /dev/vda1 rw\n41 35 8:1 / /other rw - ext4 /dev/sda1 rw\n"
    (kernel.root / "proc/1/mountinfo").write_text(line)
    assert kernel.sysfs.holders("v") == ["dm-0"]
    assert kernel.sysfs.mount_points("v") == ["/mnt/part"]


def test_whoever_holds_a_device_open_is_named(tmp_path: Path):
    status = Path("/dev/null").stat()
    process = tmp_path / "4242"
    (process / "fd").mkdir(parents=True)
    (process / "comm").write_text("dd\n")
    (process / "fd/3").symlink_to("/dev/null")
    major, minor = os.major(status.st_rdev), os.minor(status.st_rdev)
    sysfs = Sysfs(Roots(proc=tmp_path))
    assert sysfs.openers(BusDevice(Path("/dev/vhost-vdpa-0"), major, minor)) == ["4242 (dd)"]
    assert sysfs.openers(BusDevice(Path("/dev/vda"), major, minor)) == []  # a character device is no disk
    # What is on a file system whose server may be away is not looked at: that could last for ever.
    (process / "mountinfo").write_text("36 35 0:50 / /far rw - fuse.sshfs user@far rw\n")
    (process / "fdinfo").mkdir()
    (process / "fdinfo/3").write_text("pos:\t0\nflags:\t02\nmnt_id:\t36\n")
    assert sysfs.openers(BusDevice(Path("/dev/vhost-vdpa-0"), major, minor)) == []
    (process / "fdinfo/3").write_text("pos:\t0\nflags:\t02\nmnt_id:\t35\n")
    assert sysfs.openers(BusDevice(Path("/dev/vhost-vdpa-0"), major, minor)) == ["4242 (dd)"]


async def test_a_bus_driver_that_is_not_loaded_is_named(tmp_path: Path):
    class Unused:
        async def add(self, name: str, driver: str, *, timeout_s: float) -> None:
            raise AssertionError

        async def remove(self, name: str, *, timeout_s: float) -> None:
            raise AssertionError

    bus = VdpaBus(Unused(), Sysfs(Roots(tmp_path, tmp_path, tmp_path)))
    with pytest.raises(FailedPrecondition, match="vhost_vdpa") as caught:
        await bus.attach("v", Bus.VHOST, timeout_s=1)
    assert caught.value.hint == "modprobe vhost_vdpa"
