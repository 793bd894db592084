"""Taking a device off the bus: never while its driver has not let go, or the machine's whole bus would wait with us."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from csi_vduse.errors import DeadlineExceeded
from csi_vduse.vdpa.bus import VdpaBus
from csi_vduse.vdpa.sysfs import Roots, Sysfs


class Removals:
    """A netlink helper that takes devices off and notes which."""

    def __init__(self) -> None:
        self.names: list[str] = []

    async def add(self, name: str, driver: str, *, timeout_s: float) -> None:
        raise AssertionError

    async def remove(self, name: str, *, timeout_s: float) -> None:
        self.names.append(name)


@pytest.mark.parametrize("made", ["virtio3", "vhost-vdpa-0"])
async def test_an_unbind_that_somebody_began_is_waited_for(tmp_path: Path, made: str):
    """The kernel takes the link `driver` away first, and then waits for the worker."""
    netlink = Removals()
    bus = VdpaBus(netlink, Sysfs(Roots(sys=tmp_path)))
    child = bus.sysfs.device_dir("v") / made
    child.mkdir(parents=True)
    with pytest.raises(DeadlineExceeded, match="has not let go"):
        await bus.detach("v", timeout_s=0.1)
    assert netlink.names == []
    detaching = asyncio.create_task(bus.detach("v", timeout_s=10))
    await asyncio.sleep(0.1)
    assert netlink.names == []
    child.rmdir()
    await detaching
    assert netlink.names == ["v"]
