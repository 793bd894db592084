"""A node on loop devices, with the directory registry, for tests that mount for real."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.node.context import NodeContext
from csi_vduse.node.mounts import read_mounts
from csi_vduse.node.publish import PublishRequest, publish
from csi_vduse.node.stage import StageRequest, stage
from csi_vduse.node.unpublish import unpublish
from csi_vduse.node.unstage import unstage
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.ids import volume_id
from csi_vduse.volumes.model import State, Volume, VolumeParameters
from csi_vduse.volumes.policy import AccessMode, Use
from csi_vduse.volumes.registry_directory import DirectoryRegistry
from tests.unit.node.loop_agent import LoopAgent, loop_works

MIB = 1 << 20


@dataclass
class LoopNode:
    """A node, and short forms of what tests do with it."""

    directory: Path
    agent: LoopAgent
    node: NodeContext

    def image(self, volume: Volume) -> Path:
        return self.directory / f"{volume.id}.raw"

    async def create(self, name: str = "a", size_mib: int = 64, bus: Bus = Bus.VIRTIO) -> Volume:
        volume = Volume(
            id=volume_id(name),
            name=name,
            pool="p",
            backend="file",
            capacity_bytes=size_mib * MIB,
            parameters=VolumeParameters(bus=bus),
            source=None,
            filesystem=None,
            state=State.READY,
            created_at_ns=1,
        )
        with self.image(volume).open("wb") as image:
            image.truncate(volume.capacity_bytes)
        await self.node.registry.put_volume(volume)
        return volume

    async def clone(self, source: Volume, name: str) -> Volume:
        """A copy as the controller makes it: bytes and file system record."""
        clone = await self.create(name, source.capacity_bytes // MIB)
        current = await self.node.registry.get_volume(source.id)
        assert current is not None
        subprocess.run(["cp", "--sparse=always", self.image(source), self.image(clone)], check=True)
        clone = replace(clone, filesystem=current.filesystem)
        await self.node.registry.put_volume(clone)
        return clone

    async def grow(self, volume: Volume, size_mib: int) -> Volume:
        """What the controller does before NodeExpandVolume."""
        os.truncate(self.image(volume), size_mib * MIB)
        return await self.node.registry.update_volume(
            volume.id, lambda old: replace(old, capacity_bytes=size_mib * MIB)
        )

    def staging(self, volume: Volume) -> str:
        return str(self.directory / f"stage {volume.name}")

    def target(self, name: str) -> str:
        return str(self.directory / "pods" / name)

    async def stage(self, volume: Volume, use: Use) -> str:
        await stage(self.node, StageRequest(volume.id, self.staging(volume), use))
        return self.staging(volume)

    async def unstage(self, volume: Volume) -> None:
        await unstage(self.node, volume.id, self.staging(volume))

    async def publish(self, volume: Volume, name: str, use: Use, *, read_only: bool = False) -> str:
        request = PublishRequest(volume.id, self.staging(volume), self.target(name), use, read_only)
        await publish(self.node, request)
        return self.target(name)

    async def unpublish(self, volume: Volume, name: str) -> None:
        await unpublish(self.node, volume.id, self.target(name))

    def left_mounts(self) -> list[str]:
        return [m.mount_point for m in read_mounts() if m.mount_point.startswith(str(self.directory))]


def use(
    filesystem: str | None = "ext4", mode: AccessMode = AccessMode.SINGLE_NODE_WRITER, *flags: str
) -> Use:
    return Use(mode, filesystem, flags)


READER = AccessMode.SINGLE_NODE_READER_ONLY
EXCLUSIVE = AccessMode.SINGLE_NODE_SINGLE_WRITER


@pytest.fixture
async def loop_node(tmp_path: Path) -> AsyncIterator[LoopNode]:
    if not loop_works():
        pytest.skip("no loop devices here (needs root); the VM suite proves the same on VDUSE devices")
    agent = LoopAgent(tmp_path)

    async def data_path(volume: Volume, _context: Mapping[str, str]) -> FileBackend:
        return FileBackend(tmp_path / f"{volume.id}.raw")

    node = NodeContext("node-1", agent, DirectoryRegistry(tmp_path / "state"), data_path, agent.sysfs)
    try:
        yield LoopNode(tmp_path, agent, node)
    finally:
        for mount in reversed([m for m in read_mounts() if m.mount_point.startswith(str(tmp_path))]):
            subprocess.run(["umount", mount.mount_point], check=False)
        for attachment in agent.attachments.values():
            with contextlib.suppress(subprocess.CalledProcessError):
                subprocess.run(["losetup", "-d", str(attachment.path)], check=True)
