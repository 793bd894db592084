"""Publish and unpublish on loop devices: what workloads see, and what is refused."""

from __future__ import annotations

import os
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from csi_vduse.agent.model import State
from csi_vduse.errors import AlreadyExists, FailedPrecondition, InvalidArgument, Unavailable
from csi_vduse.node.context import check_path
from csi_vduse.vdpa.model import Bus
from tests.unit.node.conftest import EXCLUSIVE, READER, LoopNode, use


async def test_published_volume_shows_the_staged_files(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    target = await loop_node.publish(volume, "pod", use())
    Path(target, "f").write_text("x")
    assert Path(path, "f").read_text() == "x"
    await loop_node.publish(volume, "pod", use())
    assert loop_node.left_mounts() == [path, target]
    await loop_node.unpublish(volume, "pod")
    await loop_node.unpublish(volume, "pod")
    assert not Path(target).exists()
    assert loop_node.left_mounts() == [path]


async def test_publish_of_a_volume_that_is_not_staged_is_refused(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    Path(loop_node.staging(volume)).mkdir()
    for wanted in (use(), use(None)):
        with pytest.raises(FailedPrecondition, match="not staged"):
            await loop_node.publish(volume, "pod", wanted)
    assert not Path(loop_node.target("pod")).exists()


async def test_staging_path_of_another_volume_does_not_count_as_staged(loop_node: LoopNode) -> None:
    first, second = await loop_node.create("a"), await loop_node.create("b")
    await loop_node.stage(first, use())
    await loop_node.stage(second, use())
    subprocess.run(["umount", loop_node.staging(second)], check=True)
    subprocess.run(["mount", "--bind", loop_node.staging(first), loop_node.staging(second)], check=True)
    with pytest.raises(FailedPrecondition, match="not mounted at"):
        await loop_node.publish(second, "pod", use())


async def test_read_only_publish_refuses_writes_and_leaves_the_volume_writable(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    target = await loop_node.publish(volume, "reader", use(), read_only=True)
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "f").write_text("x")
    Path(path, "f").write_text("x")
    assert Path(target, "f").read_text() == "x"
    await loop_node.publish(volume, "reader", use(), read_only=True)
    with pytest.raises(AlreadyExists, match="published read-only"):
        await loop_node.publish(volume, "reader", use())


async def test_single_writer_gets_one_target_path(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use("ext4", EXCLUSIVE))
    target = await loop_node.publish(volume, "one", use("ext4", EXCLUSIVE))
    await loop_node.publish(volume, "one", use("ext4", EXCLUSIVE))
    with pytest.raises(FailedPrecondition, match=f"published at {target}"):
        await loop_node.publish(volume, "two", use("ext4", EXCLUSIVE))
    await loop_node.unpublish(volume, "one")
    await loop_node.publish(volume, "two", use("ext4", EXCLUSIVE))


async def test_raw_device_is_bound_as_a_block_device(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use(None))
    target = await loop_node.publish(volume, "raw", use(None))
    await loop_node.publish(volume, "raw", use(None))
    attachment = loop_node.agent.attachments[volume.id]
    assert attachment.device is not None
    found = Path(target).stat()
    assert stat.S_ISBLK(found.st_mode)
    assert found.st_rdev == os.makedev(attachment.device.major, attachment.device.minor)
    with pytest.raises(FailedPrecondition, match="still in use"):
        await loop_node.unstage(volume)
    await loop_node.unpublish(volume, "raw")
    assert not Path(target).exists()
    await loop_node.unstage(volume)


async def test_single_writer_gets_one_raw_device(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use(None, EXCLUSIVE))
    await loop_node.publish(volume, "one", use(None, EXCLUSIVE))
    with pytest.raises(FailedPrecondition, match="SINGLE_NODE_SINGLE_WRITER"):
        await loop_node.publish(volume, "two", use(None, EXCLUSIVE))


@pytest.mark.parametrize("filesystem", ["ext4", None])
async def test_kubelet_s_own_binds_of_a_target_are_no_second_workload(
    loop_node: LoopNode, filesystem: str | None
) -> None:
    """A kubelet that was restarted publishes again what it has mapped or bound subpaths of: it failed for ever."""
    wanted = use(filesystem, EXCLUSIVE)
    volume = await loop_node.create()
    await loop_node.stage(volume, wanted)
    target = await loop_node.publish(volume, "one", wanted)
    of_kubelet = loop_node.directory / "volume-subpaths"
    of_kubelet.mkdir() if filesystem else of_kubelet.touch()
    subprocess.run(["mount", "--bind", target, of_kubelet], check=True)
    await loop_node.publish(volume, "one", wanted)
    with pytest.raises(FailedPrecondition, match="SINGLE_NODE_SINGLE_WRITER"):
        await loop_node.publish(volume, "two", wanted)


async def test_a_stale_mount_at_the_target_does_not_count_as_published(loop_node: LoopNode) -> None:
    """It was taken off, and the look from before counted it: the workload got an empty directory."""
    gone, volume = await loop_node.create("gone"), await loop_node.create()
    await loop_node.stage(gone, use())
    target = await loop_node.publish(gone, "pod", use())
    attachment = loop_node.agent.attachments.pop(gone.id)
    assert attachment.device is not None
    number = f"{attachment.device.major}:{attachment.device.minor}"
    shutil.rmtree(loop_node.agent.sysfs / "dev/block" / number)
    path = await loop_node.stage(volume, use())
    Path(path, "f").write_text("x")
    await loop_node.publish(volume, "pod", use())
    loop_node.agent.attachments[gone.id] = attachment  # the loop device itself is there, and to be given back
    assert Path(target, "f").read_text() == "x"


async def test_vm_disk_is_bound_as_a_character_device(loop_node: LoopNode) -> None:
    volume = await loop_node.create(bus=Bus.VHOST)
    await loop_node.stage(volume, use(None))
    target = await loop_node.publish(volume, "vm", use(None))
    assert stat.S_ISCHR(Path(target).stat().st_mode)
    await loop_node.unpublish(volume, "vm")
    await loop_node.unstage(volume)
    assert loop_node.agent.attachments == {}


async def test_mounted_volume_is_not_published_raw_nor_the_reverse(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    with pytest.raises(FailedPrecondition, match="staged as a file system"):
        await loop_node.publish(volume, "raw", use(None))
    await loop_node.unstage(volume)
    await loop_node.stage(volume, use(None))
    with pytest.raises(FailedPrecondition, match="not mounted at"):
        await loop_node.publish(volume, "pod", use())


async def test_target_path_of_the_wrong_kind_is_refused_and_kept(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    target = Path(loop_node.target("pod"))
    target.parent.mkdir()
    target.write_text("mine")
    with pytest.raises(FailedPrecondition, match="not a directory"):
        await loop_node.publish(volume, "pod", use())
    with pytest.raises(FailedPrecondition, match="did not make"):
        await loop_node.unpublish(volume, "pod")
    assert target.read_text() == "mine"


async def test_unpublish_does_not_remove_files_below_the_target(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    target = Path(loop_node.target("pod"))
    target.mkdir(parents=True)
    (target / "f").write_text("mine")
    with pytest.raises(FailedPrecondition, match="not empty"):
        await loop_node.unpublish(volume, "pod")
    assert (target / "f").read_text() == "mine"


async def test_unpublish_refuses_to_unmount_what_is_not_ours(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    target = Path(loop_node.target("pod"))
    target.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "other", target], check=True)
    with pytest.raises(FailedPrecondition, match="mount point of other"):
        await loop_node.unpublish(volume, "pod")
    assert loop_node.left_mounts() == [str(target)]


async def test_dead_worker_makes_publish_unavailable_but_not_unpublish(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    await loop_node.publish(volume, "pod", use())
    loop_node.agent.set_state(volume.id, State.WORKER_DEAD)
    with pytest.raises(Unavailable, match="worker_dead"):
        await loop_node.publish(volume, "other", use())
    await loop_node.unpublish(volume, "pod")
    assert loop_node.left_mounts() == [path]


async def test_reader_mode_is_published_read_only(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    await loop_node.unstage(volume)
    await loop_node.stage(volume, use("ext4", READER))
    target = await loop_node.publish(volume, "pod", use("ext4", READER))
    with pytest.raises(OSError, match="Read-only"):
        Path(target, "f").write_text("x")


async def test_mount_flag_reaches_the_workload(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    wanted = use("ext4", use().mode, "noatime", "noexec")
    await loop_node.stage(volume, wanted)
    target = await loop_node.publish(volume, "pod", wanted)
    script = Path(target, "f")
    script.write_text("#!/bin/sh\n")
    script.chmod(0o755)
    with pytest.raises(PermissionError):
        subprocess.run([script], check=True)


@pytest.mark.parametrize("path", ["", "relative", "/a/../b", "/a\0b", "/", "//"])
def test_path_that_cannot_be_right_is_an_invalid_argument(path: str) -> None:
    with pytest.raises(InvalidArgument, match="target_path"):
        check_path(path, "target_path")


def test_symbolic_links_in_the_parent_are_resolved_as_the_mount_table_shows_them(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    assert check_path(f"{tmp_path}/link//x/", "p") == str((tmp_path / "real").resolve() / "x")
