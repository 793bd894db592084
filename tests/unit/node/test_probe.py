"""Blank is proved, never guessed: real mkfs on image files, then damage."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import Unavailable
from csi_vduse.node.filesystems import FILESYSTEMS
from csi_vduse.node.probe import (
    Blank,
    Foreign,
    Known,
    Unrecognised,
    interpret_blkid,
    probe_content,
    sample_regions,
)

MIB = 1 << 20
UUID = "11111111-1111-4111-8111-111111111111"
SIZES_MIB = {"ext4": (1, 64, 513, 3000), "xfs": (300, 513, 5000), "btrfs": (120, 513, 5000)}
CASES = [(name, size * MIB) for name, sizes in SIZES_MIB.items() for size in sizes]


def sparse(path: Path, size_bytes: int) -> str:
    with path.open("wb") as image:
        image.truncate(size_bytes)
    return str(path)


def overwrite(path: str, offset_bytes: int, data: bytes) -> None:
    with open(path, "r+b") as image:  # noqa: PTH123
        image.seek(offset_bytes)
        image.write(data)


@given(st.integers(min_value=1, max_value=1 << 34).map(lambda blocks: blocks * 512))
def test_regions_lie_within_the_device_in_order_and_apart(size_bytes: int) -> None:
    regions = sample_regions(size_bytes)
    end = 0
    for region in regions:
        assert region.length_bytes > 0
        assert region.length_bytes % 512 == 0
        assert region.offset_bytes >= end
        end = region.offset_bytes + region.length_bytes
    assert end == size_bytes
    assert regions[0].offset_bytes == 0


async def test_untouched_image_is_blank(tmp_path: Path) -> None:
    assert await probe_content(sparse(tmp_path / "i", 513 * MIB), 513 * MIB) == Blank()


@pytest.mark.parametrize(("name", "size_bytes"), CASES)
async def test_file_system_is_known(tmp_path: Path, name: str, size_bytes: int) -> None:
    image = sparse(tmp_path / "i", size_bytes)
    await FILESYSTEMS[name].make(image, UUID)
    assert await probe_content(image, size_bytes) == Known(name, UUID)


@pytest.mark.parametrize(("name", "size_bytes"), [case for case in CASES if case[1] > 4 * MIB])
async def test_file_system_without_its_beginning_is_not_blank(
    tmp_path: Path, name: str, size_bytes: int
) -> None:
    image = sparse(tmp_path / "i", size_bytes)
    await FILESYSTEMS[name].make(image, UUID)
    overwrite(image, 0, bytes(4 * MIB))
    assert isinstance(await probe_content(image, size_bytes), Unrecognised)


@pytest.mark.parametrize("offset_bytes", [0, 511, 4096, 2 * MIB - 1, 64 * MIB - 1, 64 * MIB])
async def test_one_byte_in_a_looked_at_place_is_not_blank(tmp_path: Path, offset_bytes: int) -> None:
    image = sparse(tmp_path / "i", 64 * MIB + 512)
    overwrite(image, offset_bytes, b"\1")
    content = await probe_content(image, 64 * MIB + 512)
    assert content == Unrecognised(offset_bytes // 512 * 512)


async def test_partition_table_is_foreign(tmp_path: Path) -> None:
    image = sparse(tmp_path / "i", 8 * MIB)
    # One primary partition of type 83 from sector 2048, and the boot signature.
    entry = bytes([0, 0, 0, 0, 0x83, 0, 0, 0]) + (2048).to_bytes(4, "little") + (8192).to_bytes(4, "little")
    overwrite(image, 446, entry + bytes(48) + b"\x55\xaa")
    assert await probe_content(image, 8 * MIB) == Foreign("a partition table (dos)")


async def test_missing_device_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="No such file"):
        await probe_content(str(tmp_path / "none"), MIB)


async def test_device_smaller_than_it_says_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match="smaller than it says"):
        await probe_content(sparse(tmp_path / "i", MIB), 2 * MIB)


async def test_unreadable_device_is_an_error(tmp_path: Path) -> None:
    directory = tmp_path / "d"
    directory.mkdir()
    with pytest.raises(Unavailable, match="Is a directory"):
        await probe_content(str(directory), MIB)


def test_volume_manager_is_foreign() -> None:
    assert interpret_blkid("TYPE=LVM2_member\nUSAGE=raid\n") == Foreign("LVM2_member (raid)")
