"""Volumes that are only read: by their access mode, by what was published, and by a mount option."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from csi_vduse.node.expand import expand
from csi_vduse.node.stage import StageRequest, stage
from csi_vduse.node.stats import volume_health
from csi_vduse.volumes.sizes import CapacityRange
from tests.unit.node.conftest import MIB, READER, LoopNode, use
from tests.unit.node.test_stage import SIZES_MIB


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_reader_mode_makes_a_read_only_device_and_mount(loop_node: LoopNode, fs: str) -> None:
    volume = await loop_node.create(size_mib=SIZES_MIB[fs])
    path = await loop_node.stage(volume, use(fs))
    Path(path, "f").write_text("x")
    await loop_node.unstage(volume)
    before = loop_node.image(volume).read_bytes()
    await loop_node.stage(volume, use(fs, READER))
    assert Path(path, "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        Path(path, "g").write_text("x")
    await loop_node.unstage(volume)
    assert loop_node.image(volume).read_bytes() == before


async def test_what_was_published_for_reading_is_read_only_whatever_its_access_mode(
    loop_node: LoopNode,
) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    Path(path, "f").write_text("x")
    await loop_node.unstage(volume)
    for _ in range(2):
        await stage(loop_node.node, StageRequest(volume.id, path, use(), {"readOnly": "true"}))
    for _ in range(2):
        target = await loop_node.publish(volume, "pod", use())
    assert Path(target, "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "g").write_text("x")


async def test_mount_option_ro_is_of_the_target_and_the_volume_can_be_staged_again(
    loop_node: LoopNode,
) -> None:
    """A class with mountOptions [ro]: the disk and the staging mount are writable, so that the volume can be used so."""
    volume = await loop_node.create(size_mib=320)
    how = use("xfs", use().mode, "ro", "noatime")
    for _ in range(2):
        path = await loop_node.stage(volume, how)
        target = await loop_node.publish(volume, "pod", how)
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "f").write_text("x")
    Path(path, "f").write_text("x")
    assert await volume_health(loop_node.node, volume.id) == ()
    await loop_node.grow(volume, 400)
    assert await expand(loop_node.node, volume.id, target, CapacityRange()) == 400 * MIB
    assert os.statvfs(path).f_blocks * 4096 > 320 * MIB


async def test_mount_option_ro_stays_where_another_option_needs_it(loop_node: LoopNode) -> None:
    volume = await loop_node.create(size_mib=320)
    await loop_node.stage(volume, use("xfs"))
    await loop_node.unstage(volume)
    how = use("xfs", use().mode, "ro", "norecovery")
    for _ in range(2):
        await loop_node.stage(volume, how)
        await loop_node.publish(volume, "pod", how)


@pytest.mark.parametrize("fs", ["ext4", "xfs"])
async def test_read_only_stage_of_a_file_system_with_a_dirty_log(loop_node: LoopNode, fs: str) -> None:
    volume = await loop_node.create(size_mib=SIZES_MIB[fs])
    path = await loop_node.stage(volume, use(fs))
    Path(path, "f").write_text("x")
    subprocess.run(["sync", "-f", path], check=True)
    dirty = await loop_node.clone(volume, "dirty")  # copied while mounted: the log is not clean
    await loop_node.stage(dirty, use(fs, READER))
