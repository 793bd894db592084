"""A mkfs that was interrupted is begun again, and nothing that anybody may have used is ever taken for one."""

from __future__ import annotations

import os
import random
import subprocess
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from csi_vduse.errors import CommandFailed, DataLoss, FailedPrecondition
from csi_vduse.node.filesystems import Making, get_filesystem
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, Volume
from tests.unit.node.conftest import READER, LoopNode, use
from tests.unit.node.test_stage import SIZES_MIB, formatted_as, nothing_left, set_record

UUID = "11111111-1111-4111-8111-111111111111"


def begun(fs: str, uuid: str = UUID) -> FilesystemRecord:
    return FilesystemRecord(fs, FilesystemState.FORMATTING, uuid)


async def made(lab: LoopNode, fs: str, uuid: str = UUID) -> Volume:
    """A volume on which a mkfs has just ended, and whose record does not say so yet."""
    volume = await lab.create(size_mib=SIZES_MIB[fs])
    await get_filesystem(fs).make(str(lab.image(volume)), uuid)
    await set_record(lab, volume, begun(fs))
    return volume


def use_it(lab: LoopNode, volume: Volume) -> bytes:
    """Mount an image by hand and put data on it; returns the image's content."""
    path = lab.directory / "by hand"
    path.mkdir()
    subprocess.run(["mount", "-o", "loop", lab.image(volume), path], check=True)
    (path / "f").write_text("data")
    subprocess.run(["umount", path], check=True)
    return lab.image(volume).read_bytes()


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_a_whole_file_system_is_taken_as_it_is(loop_node: LoopNode, fs: str) -> None:
    volume = await made(loop_node, fs)
    path = await loop_node.stage(volume, use(fs))
    Path(path, "f").write_text("x")
    assert await formatted_as(loop_node, volume) == FilesystemRecord(fs, FilesystemState.FORMATTED)
    uuid = subprocess.run(
        ["blkid", "-p", "-s", "UUID", "-o", "value", loop_node.image(volume)], check=True, capture_output=True
    ).stdout
    assert uuid.decode().strip() == UUID


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_data_under_a_record_that_says_formatting_is_not_wiped(loop_node: LoopNode, fs: str) -> None:
    volume = await made(loop_node, fs)
    use_it(loop_node, volume)
    path = await loop_node.stage(volume, use(fs))
    assert Path(path, "f").read_text() == "data"


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_another_file_system_than_the_one_begun_is_for_a_person(loop_node: LoopNode, fs: str) -> None:
    volume = await made(loop_node, fs, str(uuid4()))
    content = use_it(loop_node, volume)
    for wanted in SIZES_MIB:
        with pytest.raises(DataLoss, match="was interrupted, but the volume holds"):
            await loop_node.stage(volume, use(wanted))
    nothing_left(loop_node)
    assert loop_node.image(volume).read_bytes() == content
    # What the hint says: a clone, which has no record, is taken for what it is.
    clone = await loop_node.clone(volume, "clone")
    await set_record(loop_node, clone, None)
    assert Path(await loop_node.stage(clone, use(fs)), "f").read_text() == "data"


async def test_a_record_without_a_uuid_wipes_nothing(loop_node: LoopNode) -> None:
    """Of an older release, which gave it to copies too."""
    volume = await made(loop_node, "ext4")
    await set_record(loop_node, volume, FilesystemRecord("ext4", FilesystemState.FORMATTING))
    use_it(loop_node, volume)
    assert Path(await loop_node.stage(volume, use()), "f").read_text() == "data"
    await loop_node.unstage(volume)
    with loop_node.image(volume).open("r+b") as image:
        image.write(bytes(64 << 10))
    await set_record(loop_node, volume, FilesystemRecord("ext4", FilesystemState.FORMATTING))
    before = loop_node.image(volume).read_bytes()
    with pytest.raises(FailedPrecondition, match="not known to be formatted"):
        await loop_node.stage(volume, use())
    assert loop_node.image(volume).read_bytes() == before


async def test_a_half_made_ext4_that_was_never_mounted_is_begun_again(loop_node: LoopNode) -> None:
    volume = await made(loop_node, "ext4")
    subprocess.run(["debugfs", "-w", "-R", "clri <2>", loop_node.image(volume)], check=True)
    path = await loop_node.stage(volume, use())
    Path(path, "f").write_text("x")


async def test_a_damaged_ext4_that_was_mounted_is_for_a_person(loop_node: LoopNode) -> None:
    volume = await made(loop_node, "ext4")
    use_it(loop_node, volume)
    subprocess.run(["debugfs", "-w", "-R", "clri <2>", loop_node.image(volume)], check=True)
    before = loop_node.image(volume).read_bytes()
    with pytest.raises(DataLoss, match="may have been used"):
        await loop_node.stage(volume, use())
    assert loop_node.image(volume).read_bytes() == before


def lose_blocks(image: Path, dice: random.Random) -> None:
    """What a power cut may leave of what was being written back: any of it, here with the superblock's block."""
    superblock = SUPERBLOCKS[image.read_bytes()[65536 + 64 : 65536 + 68] == b"_BHR"]
    share = dice.choice((0.1, 0.5, 0.9))
    with image.open("r+b") as file:
        for offset in range(0, image.stat().st_size, 4096):
            if offset != superblock and any(os.pread(file.fileno(), 4096, offset)) and dice.random() < share:
                os.pwrite(file.fileno(), bytes(4096), offset)


SUPERBLOCKS = {True: 65536, False: 0}  # btrfs, and the others


@pytest.mark.parametrize("seed", [0, 3, 5])
@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_what_a_power_cut_leaves_of_a_mkfs_is_begun_again_or_for_a_person(
    loop_node: LoopNode, fs: str, seed: int
) -> None:
    """Only ext4 says for sure that nobody has mounted it; trying again does not help the others."""
    volume = await made(loop_node, fs)
    lose_blocks(loop_node.image(volume), random.Random(seed))
    left = loop_node.image(volume).read_bytes()
    try:
        path = await loop_node.stage(volume, use(fs))
    except DataLoss:
        assert fs != "ext4"
        assert loop_node.image(volume).read_bytes() == left
    else:
        Path(path, "f").write_text("x")


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_wherever_mkfs_is_killed_the_volume_can_be_staged(
    loop_node: LoopNode, fs: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each time at another of its writes, until it needs no more of them."""
    tools = tmp_path / "bin"
    tools.mkdir()
    real = f"/usr/sbin/mkfs.{fs}"
    killed, at = 0, 1
    while True:
        volume = await loop_node.create(f"v{at}", size_mib=SIZES_MIB[fs])
        killer = tools / f"mkfs.{fs}"
        killer.write_text(
            f"#!/bin/sh\nexec strace -f -qq -o /dev/null -e trace=pwrite64"
            f' -e inject=pwrite64:signal=KILL:when={at} {real} "$@"\n'
        )
        killer.chmod(0o755)
        with monkeypatch.context() as patch:
            patch.setenv("PATH", str(tools), prepend=":")
            try:
                await loop_node.stage(volume, use(fs))
            except CommandFailed as error:
                assert error.exit_code < 0, error  # noqa: PT017
                record = await formatted_as(loop_node, volume)
                assert record is not None
                assert record.state is FilesystemState.FORMATTING
            else:
                break
        path = await loop_node.stage(volume, use(fs))
        Path(path, "f").write_text("x")
        await loop_node.unstage(volume)
        loop_node.image(volume).unlink()
        killed += 1
        at += max(1, at // 4)
    assert killed > 5


@pytest.mark.parametrize("fs", SIZES_MIB)
async def test_a_fresh_file_system_is_whole_by_its_own_account(loop_node: LoopNode, fs: str) -> None:
    volume = await made(loop_node, fs)
    assert await get_filesystem(fs).examine(str(loop_node.image(volume))) is Making.WHOLE


async def test_an_xfs_whose_mkfs_did_not_say_that_it_is_done_is_unfinished(loop_node: LoopNode) -> None:
    volume = await made(loop_node, "xfs")
    subprocess.run(
        ["xfs_db", "-x", "-c", "sb 0", "-c", "write -d inprogress 1", loop_node.image(volume)], check=True
    )
    assert await get_filesystem("xfs").examine(str(loop_node.image(volume))) is Making.UNFINISHED


async def test_an_xfs_with_damage_is_damaged_and_no_half_made_one(loop_node: LoopNode) -> None:
    volume = await made(loop_node, "xfs")
    use_it(loop_node, volume)
    subprocess.run(
        ["xfs_db", "-x", "-c", "sb 0", "-c", "write -d icount 9999", loop_node.image(volume)], check=True
    )
    assert await get_filesystem("xfs").examine(str(loop_node.image(volume))) is Making.DAMAGED


async def test_raw_use_ends_what_a_begun_format_said(loop_node: LoopNode) -> None:
    """Who has it raw writes what he likes, and it need not have a mark that anybody knows."""
    volume = await loop_node.create()
    await set_record(loop_node, volume, begun("ext4"))
    await loop_node.stage(volume, use(None))
    device = loop_node.agent.attachments[volume.id].path
    assert device is not None
    with device.open("r+b") as disk:
        disk.write(b"records of a database")
    await loop_node.unstage(volume)
    with pytest.raises(FailedPrecondition, match="never formatted, but holds data of no known format"):
        await loop_node.stage(volume, use())
    assert loop_node.image(volume).read_bytes()[:7] == b"records"


async def test_raw_use_for_reading_ends_nothing(loop_node: LoopNode) -> None:
    volume = await loop_node.create()
    await loop_node.node.registry.update_volume(volume.id, lambda old: replace(old, filesystem=begun("ext4")))
    await loop_node.stage(volume, use(None, READER))
    assert await formatted_as(loop_node, volume) == begun("ext4")
