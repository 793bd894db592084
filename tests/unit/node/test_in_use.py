"""A device that others have: busy is no damage, and whoever has it is named."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from csi_vduse.errors import DataLoss, FailedPrecondition, Unavailable, VduseError
from csi_vduse.node.filesystems import Making, get_filesystem
from tests.unit.namespaces import elsewhere
from tests.unit.node.conftest import LoopNode, use
from tests.unit.node.loop_agent import detach_loop, losetup
from tests.unit.node.test_stage import SIZES_MIB, nothing_left


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_a_volume_that_is_still_mounted_elsewhere_is_staged_again(loop_node: LoopNode, fs: str) -> None:
    """A process with a mount table of its own keeps the file system alive: staging shows the same one again."""
    volume = await loop_node.create(size_mib=SIZES_MIB[fs])
    path = await loop_node.stage(volume, use(fs))
    Path(path, "f").write_text("x")
    with elsewhere():
        with pytest.raises(FailedPrecondition, match="in use"):
            await loop_node.unstage(volume)
        assert loop_node.left_mounts() == []
        await loop_node.stage(volume, use(fs))
        Path(path, "g").write_text("y")
        assert Path(path, "f").read_text() == "x"
    await loop_node.unstage(volume)
    await loop_node.stage(volume, use(fs))
    assert Path(path, "g").read_text() == "y"


def tool(directory: Path, name: str, script: str) -> None:
    """Put a program before the real one of its name."""
    directory.mkdir(exist_ok=True)
    (directory / name).write_text(f"#!/bin/sh\n{script}\n")
    (directory / name).chmod(0o755)


@pytest.mark.parametrize(
    ("script", "error"),
    [
        ("exit 0", None),
        ("exit 1", None),
        ("exit 2", None),
        ("exit 3", None),
        ("echo '/dev/x is in use.'; exit 8", None),
        ("echo '/dev/x is mounted.'; exit 8", None),
        ("exit 4", DataLoss),
        ("exit 5", DataLoss),
        ("exit 12", DataLoss),
        ("echo 'The superblock could not be read or does not describe a valid ext4'; exit 8", DataLoss),
        ("echo 'e2fsck: Memory allocation failed while x'; exit 8", Unavailable),
        ("exit 16", Unavailable),
        ("exit 32", Unavailable),
        ("exit 128", Unavailable),
        ("kill -9 $$", Unavailable),
        ("kill -TERM $$", Unavailable),
    ],
)
async def test_only_damage_that_e2fsck_saw_is_data_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, error: type[VduseError] | None
) -> None:
    tool(tmp_path / "bin", "e2fsck", script)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    if error is None:
        await get_filesystem("ext4").check("/dev/x")
        return
    with pytest.raises(error):
        await get_filesystem("ext4").check("/dev/x")


@pytest.mark.parametrize(
    ("fs", "name", "script", "seen"),
    [
        ("xfs", "xfs_repair", "exit 0", Making.WHOLE),
        ("xfs", "xfs_repair", "echo 'No modify flag set, skipping' >&2; exit 1", Making.DAMAGED),
        (
            "xfs",
            "xfs_repair",
            "echo 'Sorry, could not find valid secondary superblock'; exit 1",
            Making.DAMAGED,
        ),
        ("xfs", "xfs_repair", "echo 'fatal error -- read failed: Input/output error'; exit 1", None),
        ("xfs", "xfs_repair", "echo 'cannot open /dev/x: Device or resource busy'; exit 1", None),
        ("xfs", "xfs_repair", "echo 'Memory allocation failure'; exit 1", None),
        ("xfs", "xfs_repair", "exit 2", None),
        ("xfs", "xfs_repair", "echo 'contains a mounted and writable filesystem'; exit 1", None),
        ("xfs", "xfs_repair", "kill -9 $$", None),
        ("btrfs", "btrfs", "exit 0", Making.WHOLE),
        ("btrfs", "btrfs", "echo 'found 147456 bytes used, error(s) found'; exit 1", Making.DAMAGED),
        ("btrfs", "btrfs", "echo 'ERROR: cannot read chunk root' >&2; exit 1", Making.DAMAGED),
        ("btrfs", "btrfs", "echo 'ERROR: /dev/x is currently mounted'; exit 1", None),
        ("btrfs", "btrfs", "echo 'ERROR: cannot open device: Input/output error' >&2; exit 1", None),
        ("btrfs", "btrfs", "echo 'ERROR: not enough memory: Cannot allocate memory' >&2; exit 1", None),
        ("btrfs", "btrfs", "kill -9 $$", None),
        ("ext4", "e2fsck", "exit 8", None),
        ("ext4", "e2fsck", "kill -9 $$", None),
    ],
)
async def test_a_tool_that_could_not_look_says_nothing_of_what_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fs: str, name: str, script: str, seen: Making | None
) -> None:
    tool(tmp_path / "bin", name, script)
    tool(tmp_path / "bin", "xfs_db", "echo inprogress = 0")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")
    if seen is not None:
        assert await get_filesystem(fs).examine("/dev/x") is seen
        return
    with pytest.raises(Unavailable, match="could not look"):
        await get_filesystem(fs).examine("/dev/x")


async def test_a_loop_device_over_a_published_disk_is_named(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use(None))
    target = await loop_node.publish(volume, "raw", use(None))
    loop = losetup("--find", "--show", target)
    try:
        with pytest.raises(FailedPrecondition, match=f"cannot unmount.*{loop.removeprefix('/dev/')}"):
            await loop_node.unpublish(volume, "raw")
    finally:
        detach_loop(loop)
    await loop_node.unpublish(volume, "raw")
    await loop_node.unstage(volume)
    nothing_left(loop_node)


async def test_a_loop_device_over_a_file_of_a_staged_volume_is_named(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = Path(await loop_node.stage(volume, use()))
    (path / "image").touch()
    os.truncate(path / "image", 1 << 20)
    loop = losetup("--find", "--show", str(path / "image"))
    try:
        with pytest.raises(FailedPrecondition, match=f"cannot unmount.*{loop.removeprefix('/dev/')}"):
            await loop_node.unstage(volume)
    finally:
        detach_loop(loop)
    await loop_node.unstage(volume)
