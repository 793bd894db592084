"""Stage and unstage on loop devices: what is formatted, what is refused, and that nothing is left."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from csi_vduse.agent.model import State, device_name
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import (
    AlreadyExists,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unavailable,
    VduseError,
)
from csi_vduse.node.filesystems import get_filesystem
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, Volume
from tests.unit.node.conftest import MIB, READER, LoopNode, use

SIZES_MIB = {"ext4": 64, "xfs": 320, "btrfs": 256}


async def formatted_as(lab: LoopNode, volume: Volume) -> FilesystemRecord | None:
    current = await lab.node.registry.get_volume(volume.id)
    assert current is not None
    return current.filesystem


async def set_record(lab: LoopNode, volume: Volume, record: FilesystemRecord | None) -> None:
    await lab.node.registry.update_volume(volume.id, lambda old: replace(old, filesystem=record))


def nothing_left(lab: LoopNode) -> None:
    assert lab.left_mounts() == []
    assert lab.agent.attachments == {}


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_data_survives_unstage_and_stage(loop_node: LoopNode, fs: str) -> None:
    volume = await loop_node.create(size_mib=SIZES_MIB[fs])
    path = await loop_node.stage(volume, use(fs))
    Path(path, "f").write_bytes(b"data" * 10000)
    await loop_node.unstage(volume)
    nothing_left(loop_node)
    assert await formatted_as(loop_node, volume) == FilesystemRecord(fs, FilesystemState.FORMATTED)
    await loop_node.stage(volume, use(fs))
    assert Path(path, "f").read_bytes() == b"data" * 10000
    await loop_node.unstage(volume)


async def test_limits_are_those_of_the_volume_whenever_it_is_staged(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    for limits in (Throttle(100), Throttle(0, 1 << 20)):
        await loop_node.node.registry.update_volume(
            volume.id, lambda old, new=limits: replace(old, throttle=new)
        )
        await loop_node.stage(volume, use())
        assert loop_node.agent.attachments[volume.id].spec.throttle == limits


async def test_staging_twice_and_unstaging_twice_is_fine(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    Path(path, "f").write_text("x")
    await loop_node.stage(volume, use())
    assert Path(path, "f").read_text() == "x"
    assert loop_node.left_mounts() == [path]
    await loop_node.unstage(volume)
    await loop_node.unstage(volume)
    nothing_left(loop_node)


async def test_staged_volume_is_not_staged_otherwise(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    with pytest.raises(AlreadyExists, match="staged as ext4; xfs"):
        await loop_node.stage(volume, use("xfs"))
    with pytest.raises(AlreadyExists, match="staged writable"):
        await loop_node.stage(volume, use("ext4", READER))
    with pytest.raises(AlreadyExists, match="staged as a file system"):
        await loop_node.stage(volume, use(None))
    assert loop_node.left_mounts() == [loop_node.staging(volume)]


async def test_unknown_volume_is_not_found(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.node.registry.delete_volume(volume.id)
    with pytest.raises(NotFound):
        await loop_node.stage(volume, use())


async def test_raw_volume_is_attached_and_not_touched(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use(None))
    await loop_node.stage(volume, use(None))
    assert loop_node.left_mounts() == []
    assert not any(loop_node.image(volume).read_bytes())
    assert await formatted_as(loop_node, volume) is None
    await loop_node.unstage(volume)
    nothing_left(loop_node)


async def test_unstage_of_a_raw_volume_has_seen_that_the_device_is_gone(loop_node: LoopNode) -> None:
    """It believed the agent, which had forgotten the volume."""
    volume = await loop_node.create(size_mib=16)
    await loop_node.stage(volume, use(None))
    left = loop_node.agent.sysfs / "bus/vdpa/devices" / device_name(volume.id)
    left.mkdir(parents=True)
    with pytest.raises(FailedPrecondition, match="still has a device"):
        await loop_node.unstage(volume)
    left.rmdir()
    await loop_node.unstage(volume)
    nothing_left(loop_node)


async def test_vm_disk_cannot_be_mounted_but_staged_raw(loop_node: LoopNode) -> None:
    volume = await loop_node.create(bus=Bus.VHOST)
    with pytest.raises(InvalidArgument, match="VM's disk"):
        await loop_node.stage(volume, use("ext4"))
    nothing_left(loop_node)
    await loop_node.stage(volume, use(None))
    await loop_node.unstage(volume)
    nothing_left(loop_node)


# ---------------------------------------------------------------------- never formatted on a guess


async def test_formatted_volume_without_superblock_is_not_formatted_again(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    await loop_node.unstage(volume)
    image = loop_node.image(volume)
    with image.open("r+b") as file:
        file.write(bytes(1 * MIB))
    before = image.read_bytes()
    with pytest.raises(DataLoss, match="formatted as ext4, but holds data of no known format"):
        await loop_node.stage(volume, use())
    assert image.read_bytes() == before
    nothing_left(loop_node)


async def test_formatted_volume_that_reads_as_zeros_is_not_formatted_again(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await set_record(loop_node, volume, FilesystemRecord("ext4", FilesystemState.FORMATTED))
    with pytest.raises(DataLoss, match="nothing but zeros"):
        await loop_node.stage(volume, use())
    assert not any(loop_node.image(volume).read_bytes())


async def test_data_on_a_never_formatted_volume_is_kept(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    with loop_node.image(volume).open("r+b") as file:
        file.seek(5000)
        file.write(b"precious")
    with pytest.raises(FailedPrecondition, match="never formatted, but holds data of no known format"):
        await loop_node.stage(volume, use())
    assert loop_node.image(volume).read_bytes()[5000:5008] == b"precious"
    assert await formatted_as(loop_node, volume) is None
    nothing_left(loop_node)


async def test_file_system_that_came_with_the_content_is_taken_over(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await get_filesystem("ext4").make(str(loop_node.image(volume)), str(uuid4()))
    with pytest.raises(FailedPrecondition, match=r"holds a ext4 file system with UUID .*; xfs"):
        await loop_node.stage(volume, use("xfs"))
    await loop_node.stage(volume, use("ext4"))
    assert await formatted_as(loop_node, volume) == FilesystemRecord("ext4", FilesystemState.FORMATTED)


async def test_failed_mkfs_leaves_the_formatting_mark_and_no_device(
    loop_node: LoopNode, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    volume = await loop_node.create()
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "mkfs.ext4").write_text("#!/bin/sh\necho no luck >&2\nexit 7\n")
    (tools / "mkfs.ext4").chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(tools), prepend=":")
        with pytest.raises(Exception, match="no luck"):
            await loop_node.stage(volume, use())
    nothing_left(loop_node)
    record = await formatted_as(loop_node, volume)
    assert record is not None
    assert (record.type, record.state) == ("ext4", FilesystemState.FORMATTING)
    await loop_node.stage(volume, use())


async def test_read_only_mode_never_formats(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    with pytest.raises(FailedPrecondition, match="no file system yet"):
        await loop_node.stage(volume, use("ext4", READER))
    assert not any(loop_node.image(volume).read_bytes())
    nothing_left(loop_node)


async def test_too_small_for_the_file_system_says_so_before_writing(loop_node: LoopNode) -> None:
    volume = await loop_node.create(size_mib=64)
    with pytest.raises(FailedPrecondition, match="xfs needs 314572800 bytes"):
        await loop_node.stage(volume, use("xfs"))
    assert await formatted_as(loop_node, volume) is None


# ------------------------------------------------------------------------- undo, identity, clones


async def test_wrong_disk_is_noticed_before_anything_is_written(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    loop_node.agent.wrong_serial = "vol-of-somebody-else"
    with pytest.raises(FailedPrecondition, match="vol-of-somebody-else"):
        await loop_node.stage(volume, use())
    nothing_left(loop_node)
    assert not any(loop_node.image(volume).read_bytes())


async def test_failed_mount_leaves_nothing(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    with pytest.raises(FailedPrecondition, match="cannot be mounted"):
        await loop_node.stage(volume, use("ext4", use().mode, "nosuchoption"))
    nothing_left(loop_node)
    assert not Path(loop_node.staging(volume)).exists()


@pytest.mark.parametrize("undo", ["detach", "unmount"])
async def test_an_undo_that_fails_does_not_hide_what_went_wrong(
    loop_node: LoopNode, monkeypatch: pytest.MonkeyPatch, undo: str
) -> None:
    """Such as: udev still reads the disk. The next stage, or unstage, finds what is left."""
    volume = await loop_node.create()

    async def fails(*_: object) -> None:
        raise FailedPrecondition("held open by 5 ((udev-worker))")

    with monkeypatch.context() as patch:
        if undo == "detach":
            patch.setattr(loop_node.agent, "detach", fails)
        else:
            patch.setattr("csi_vduse.node.mounts.unmount", fails)
            patch.setattr("csi_vduse.node.stage.prove_mounted", lambda *_: _raise(DataLoss("not the disk")))
        flags = ("nosuchoption",) if undo == "detach" else ()
        with pytest.raises(VduseError, match=r"cannot be mounted|not the disk"):
            await loop_node.stage(volume, use("ext4", use().mode, *flags))
    await loop_node.stage(volume, use())
    await loop_node.unstage(volume)
    nothing_left(loop_node)


def _raise(error: VduseError) -> None:
    raise error


async def test_staging_path_that_is_a_file_is_refused_and_kept(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    Path(loop_node.staging(volume)).write_text("mine")
    with pytest.raises(FailedPrecondition, match="not a directory"):
        await loop_node.stage(volume, use())
    assert Path(loop_node.staging(volume)).read_text() == "mine"
    nothing_left(loop_node)


async def test_agent_that_is_away_is_reported(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    loop_node.agent.fail["attach"] = Unavailable("agent is away")
    with pytest.raises(Unavailable, match="away"):
        await loop_node.stage(volume, use())
    assert loop_node.agent.calls[-1] == "detach"


async def test_dead_worker_makes_stage_unavailable(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    loop_node.agent.set_state(volume.id, State.WORKER_DEAD)
    with pytest.raises(Unavailable, match="worker_dead"):
        await loop_node.stage(volume, use())
    assert loop_node.left_mounts() == [loop_node.staging(volume)]


async def test_foreign_mount_at_the_staging_path_is_refused_and_kept(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = Path(loop_node.staging(volume))
    path.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "other", path], check=True)
    for call in (loop_node.stage(volume, use()), loop_node.unstage(volume)):
        with pytest.raises(FailedPrecondition, match=r"mount point of other \(tmpfs"):
            await call
    assert loop_node.left_mounts() == [str(path)]


async def test_mount_of_another_volume_at_the_staging_path_is_named(loop_node: LoopNode) -> None:
    first, second = await loop_node.create("a"), await loop_node.create("b")
    await loop_node.stage(first, use())
    Path(loop_node.staging(second)).mkdir()
    subprocess.run(["mount", "--bind", loop_node.staging(first), loop_node.staging(second)], check=True)
    with pytest.raises(FailedPrecondition, match=f"volume {first.id}"):
        await loop_node.stage(second, use())


async def test_stale_mount_of_a_removed_disk_is_cleared(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    # The disk is gone from sysfs and from the agent; the mount is still there.
    attachment = loop_node.agent.attachments.pop(volume.id)
    assert attachment.device is not None
    gone = loop_node.agent.sysfs / "dev/block" / f"{attachment.device.major}:{attachment.device.minor}"
    gone.rename(loop_node.directory / "gone")
    await loop_node.unstage(volume)
    assert loop_node.left_mounts() == []
    subprocess.run(["losetup", "-d", str(attachment.device.path)], check=True)
    assert Path(path).is_dir()


async def test_unstage_refuses_while_published(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.stage(volume, use())
    target = await loop_node.publish(volume, "p", use())
    with pytest.raises(FailedPrecondition, match=f"in use at {target}"):
        await loop_node.unstage(volume)
    assert loop_node.left_mounts() == [loop_node.staging(volume), target]


async def test_unstage_refuses_while_files_are_open(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    with Path(path, "f").open("w"), pytest.raises(FailedPrecondition, match="cannot unmount"):
        await loop_node.unstage(volume)
    await loop_node.unstage(volume)


async def test_xfs_clone_mounts_beside_its_source(loop_node: LoopNode) -> None:
    volume = await loop_node.create(size_mib=320)
    path = await loop_node.stage(volume, use("xfs"))
    Path(path, "f").write_text("source")
    await loop_node.unstage(volume)
    clone = await loop_node.clone(volume, "clone")
    await loop_node.stage(volume, use("xfs"))
    clone_path = await loop_node.stage(clone, use("xfs"))
    Path(clone_path, "f").write_text("clone")
    assert Path(path, "f").read_text() == "source"


async def test_damaged_file_system_is_data_loss_and_not_mounted(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    path = await loop_node.stage(volume, use())
    for index in range(50):
        Path(path, f"d{index}").mkdir()
    await loop_node.unstage(volume)
    # Root directory's inode becomes garbage and the file system is marked as having errors.
    subprocess.run(
        ["debugfs", "-w", "-R", "clri <2>", loop_node.image(volume)], check=True, capture_output=True
    )
    subprocess.run(
        ["debugfs", "-w", "-R", "set_super_value state 2", loop_node.image(volume)],
        check=True,
        capture_output=True,
    )
    with pytest.raises(DataLoss, match="e2fsck found errors"):
        await loop_node.stage(volume, use())
    nothing_left(loop_node)
