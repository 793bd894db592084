"""Expand and stats on loop devices: sizes are seen, not believed."""

from __future__ import annotations

import subprocess
from functools import partial
from pathlib import Path

import pytest

from csi_vduse.agent.model import State
from csi_vduse.errors import FailedPrecondition, NotFound, OutOfRange
from csi_vduse.node.expand import expand
from csi_vduse.node.filesystems import get_filesystem
from csi_vduse.node.mounts import read_mounts, top_mount
from csi_vduse.node.stats import volume_health, volume_stats
from csi_vduse.node.usage import Usage, parse_usage
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.sizes import CapacityRange
from tests.unit.node.conftest import MIB, READER, LoopNode, use
from tests.unit.node.loop_agent import can_grow_ext4

GROWTH_MIB = {
    "xfs": (320, 640),
    "btrfs": (256, 512),
    "ext4": (64, 200),
}
FILESYSTEMS = [
    pytest.param(
        fs,
        marks=pytest.mark.skipif(
            fs == "ext4" and not can_grow_ext4(), reason="ext4 grows online only with CAP_SYS_RESOURCE"
        ),
    )
    for fs in GROWTH_MIB
]


async def file_system_bytes(path: str) -> int:
    mount = top_mount(read_mounts(), path)
    assert mount is not None
    return await get_filesystem(mount.fs_type).size_bytes(mount.source, path)


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_file_system_grows_online_with_its_volume(loop_node: LoopNode, fs: str) -> None:
    before_mib, after_mib = GROWTH_MIB[fs]
    volume = await loop_node.create(size_mib=before_mib)
    path = await loop_node.stage(volume, use(fs))
    target = await loop_node.publish(volume, "pod", use(fs), read_only=True)
    Path(path, "f").write_text("x")
    await loop_node.grow(volume, after_mib)
    for _ in range(2):
        assert await expand(loop_node.node, volume.id, target, CapacityRange()) == after_mib * MIB
    assert await file_system_bytes(path) == after_mib * MIB
    assert Path(target, "f").read_text() == "x"


@pytest.mark.parametrize("fs", FILESYSTEMS)
async def test_volume_that_grew_while_unstaged_has_a_grown_file_system(loop_node: LoopNode, fs: str) -> None:
    before_mib, after_mib = GROWTH_MIB[fs]
    volume = await loop_node.create(size_mib=before_mib)
    await loop_node.stage(volume, use(fs))
    await loop_node.unstage(volume)
    await loop_node.grow(volume, after_mib)
    path = await loop_node.stage(volume, use(fs))
    assert await file_system_bytes(path) == after_mib * MIB


@pytest.mark.parametrize("how", ["default subvolume", "subvol="])
async def test_btrfs_of_which_a_subvolume_is_mounted_grows(loop_node: LoopNode, how: str) -> None:
    volume = await loop_node.create(size_mib=256)
    path = await loop_node.stage(volume, use("btrfs"))
    run = partial(subprocess.run, check=True, capture_output=True)
    run(["btrfs", "subvolume", "create", f"{path}/sub"])
    if how == "default subvolume":
        run(["btrfs", "subvolume", "set-default", f"{path}/sub"])
    await loop_node.unstage(volume)
    flags = () if how == "default subvolume" else ("subvol=/sub",)
    wanted = use("btrfs", use().mode, *flags)
    await loop_node.stage(volume, wanted)
    target = await loop_node.publish(volume, "pod", wanted)
    Path(path, "file").touch()
    part = Path(loop_node.target("part"))  # as kubelet mounts a subPath that is a file
    part.touch()
    run(["mount", "--bind", f"{path}/file", part])
    await loop_node.grow(volume, 512)
    assert await expand(loop_node.node, volume.id, target, CapacityRange()) == 512 * MIB
    assert await file_system_bytes(path) == 512 * MIB


async def test_a_file_system_of_which_only_a_part_is_to_be_seen_is_not_called_grown(
    loop_node: LoopNode,
) -> None:
    volume = await loop_node.create(size_mib=320)
    path = await loop_node.stage(volume, use("xfs"))
    Path(path, "d").mkdir()
    part = Path(loop_node.target("part"))
    part.mkdir(parents=True)
    subprocess.run(["mount", "--bind", f"{path}/d", part], check=True)
    subprocess.run(["umount", path], check=True)
    await loop_node.grow(volume, 400)
    with pytest.raises(FailedPrecondition, match="only a part"):
        await expand(loop_node.node, volume.id, str(part), CapacityRange())


@pytest.mark.parametrize("bus", list(Bus))
async def test_raw_volume_grows(loop_node: LoopNode, bus: Bus) -> None:
    volume = await loop_node.create(bus=bus)
    await loop_node.stage(volume, use(None))
    target = await loop_node.publish(volume, "raw", use(None))
    await loop_node.grow(volume, 100)
    assert await expand(loop_node.node, volume.id, target, CapacityRange(100 * MIB)) == 100 * MIB
    stats = await volume_stats(loop_node.node, volume.id, target)
    assert (stats.block_bytes, stats.findings) == (100 * MIB, ())


async def test_node_does_not_expand_beyond_what_the_controller_did(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    with pytest.raises(OutOfRange, match="ControllerExpandVolume comes first"):
        await expand(loop_node.node, volume.id, path, CapacityRange(100 * MIB))


async def test_expand_of_a_volume_that_is_not_staged_is_refused(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    with pytest.raises(FailedPrecondition, match="not staged"):
        await expand(loop_node.node, volume.id, loop_node.staging(volume), CapacityRange())
    with pytest.raises(NotFound):
        await expand(loop_node.node, "vol-0000000000000000", "/x", CapacityRange())


async def test_read_only_file_system_is_not_grown(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    await loop_node.unstage(volume)
    path = await loop_node.stage(volume, use("ext4", READER))
    await loop_node.grow(volume, 100)
    with pytest.raises(FailedPrecondition, match="read-only and cannot grow"):
        await expand(loop_node.node, volume.id, path, CapacityRange())


async def test_stats_tell_bytes_and_inodes(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    target = await loop_node.publish(volume, "pod", use())
    before = await volume_stats(loop_node.node, volume.id, path)
    Path(path, "f").write_bytes(bytes(10 * MIB))
    after = await volume_stats(loop_node.node, volume.id, target)
    assert before.usage is not None
    assert after.usage is not None
    assert before.usage.total_bytes == after.usage.total_bytes < 64 * MIB
    assert after.usage.used_bytes - before.usage.used_bytes >= 10 * MIB
    assert (before.usage.free_inodes or 0) - (after.usage.free_inodes or 0) == 1
    assert after.findings == ()


async def test_stats_of_a_path_where_the_volume_is_not_are_not_found(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    with pytest.raises(NotFound, match="is not at"):
        await volume_stats(loop_node.node, volume.id, str(loop_node.directory))
    with pytest.raises(NotFound, match="does not exist"):
        await volume_stats(loop_node.node, "vol-0000000000000000", loop_node.staging(volume))


@pytest.mark.parametrize(
    ("state", "reason"),
    [(State.WORKER_DEAD, "WorkerDead"), (State.STALLED, "Stalled"), (State.BROKEN, "DeviceBroken")],
)
async def test_trouble_of_the_device_is_a_finding(loop_node: LoopNode, state: State, reason: str) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    assert await volume_health(loop_node.node, volume.id) == ()
    loop_node.agent.set_state(volume.id, state)
    (finding,) = (await volume_stats(loop_node.node, volume.id, path)).findings
    assert finding.reason == reason
    assert await volume_health(loop_node.node, volume.id) == (finding,)


def test_file_system_without_inode_counts_tells_none() -> None:
    assert parse_usage("4096 100 50 60 0 0\n") == Usage(409600, 204800, 163840, None, None)
