"""What lies on a device: nothing, a file system, or something else. Not being able to read is an error.

The question decides whether data is overwritten, so "blank" must be proved: blkid(8) finding nothing is no
proof (it says the same of a device that it cannot read, and of a file system whose first superblock was
wiped). Blank means that we read the places where file systems, partition tables and volume managers keep
their marks, the backup superblocks included, and that every byte there is zero.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.errors import CommandFailed, Unavailable
from csi_vduse.run import run

PROBE_TIMEOUT_S = 60.0
_KIB, _MIB, _GIB = 1 << 10, 1 << 20, 1 << 30
_HEAD_BYTES = 2 * _MIB
_TAIL_BYTES = 1 * _MIB
_WINDOW_BYTES = 128 * _KIB
_BLKID_NOTHING, _BLKID_AMBIVALENT = 2, 8
# mke2fs sparse_super: backups in groups 1 and powers of 3, 5, 7. A group has 8 * block size blocks.
_EXT4_GROUPS = (1, 3, 5, 7, 9, 25, 27, 49, 81)
_EXT4_BLOCK_BYTES = (1024, 2048, 4096)
# btrfs on-disk format: superblock copies (BTRFS_SUPER_MIRROR_SHIFT).
_BTRFS_MIRRORS = (64 * _MIB, 256 * _GIB)
# mkfs.xfs makes four allocation groups on one device up to 4 TiB, and a superblock begins each.
_XFS_GROUPS = 4


@dataclass(frozen=True)
class Blank:
    """Nothing: every looked-at byte is zero."""


@dataclass(frozen=True)
class Known:
    """A file system, by the name and the UUID that blkid gives it."""

    fs_type: str
    uuid: str = ""


@dataclass(frozen=True)
class Foreign:
    """What has a known mark and is no file system as a whole: a partition table, a volume manager's, several of them."""

    description: str


@dataclass(frozen=True)
class Unrecognised:
    """Data without any mark that blkid knows; the first of it is in the block at this offset."""

    offset_bytes: int


@dataclass(frozen=True)
class HalfMade:
    """A file system whose mkfs did not end, and which was never mounted: nobody's data can be in it."""

    fs_type: str
    uuid: str


Content = Blank | Known | Foreign | Unrecognised | HalfMade


@dataclass(frozen=True, order=True)
class Region:
    """Part of a device."""

    offset_bytes: int
    length_bytes: int


def sample_regions(size_bytes: int) -> tuple[Region, ...]:
    """Return the regions to read, in order, without overlap, within the device; pure.

    size_bytes: of the device, a multiple of 512.
    """
    places = [(0, _HEAD_BYTES), (size_bytes - _TAIL_BYTES, size_bytes)]
    for block_bytes in _EXT4_BLOCK_BYTES:
        group_bytes = 8 * block_bytes * block_bytes
        # With 1 KiB blocks, block 0 belongs to no group: the window is wide enough for that offset.
        places += [_window(group * group_bytes) for group in _EXT4_GROUPS]
    places += [_window(offset) for offset in _BTRFS_MIRRORS]
    places += [_window(size_bytes * group // _XFS_GROUPS) for group in range(1, _XFS_GROUPS)]
    merged: list[tuple[int, int]] = []
    for start, end in sorted((max(start, 0), min(end, size_bytes)) for start, end in places):
        if start >= end:
            continue
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return tuple(Region(start, end - start) for start, end in merged)


def _window(centre_bytes: int) -> tuple[int, int]:
    centre = centre_bytes // _WINDOW_BYTES * _WINDOW_BYTES
    return centre - _WINDOW_BYTES, centre + _WINDOW_BYTES


async def probe_content(device: str, size_bytes: int) -> Content:
    """Say what lies on a device; never HalfMade: only a file system's own tools can tell (filesystems/).

    Args:
        device: path of a block device or image.
        size_bytes: its size; all of it must be readable.

    Raises:
        Unavailable: it cannot be read, or blkid cannot tell why it found nothing.
        DeadlineExceeded: it does not answer.
    """
    try:
        first_data = await _first_data(device, sample_regions(size_bytes))
        output = await run(
            ["blkid", "--probe", "--output", "export", device],
            timeout_s=PROBE_TIMEOUT_S,
            ok_codes=(0, _BLKID_NOTHING, _BLKID_AMBIVALENT),
        )
    except CommandFailed as error:
        raise Unavailable(
            f"cannot read {device} to see what it holds: {error.output.strip()}",
            hint="nothing was changed; look at the volume's worker and backend",
        ) from error
    if output.exit_code == _BLKID_AMBIVALENT:
        return Foreign("signatures of more than one format")
    if output.exit_code == _BLKID_NOTHING:
        return Blank() if first_data is None else Unrecognised(first_data)
    return interpret_blkid(output.stdout)


def interpret_blkid(export: str) -> Known | Foreign:
    """Read blkid's NAME=VALUE lines; pure."""
    values = dict(line.split("=", 1) for line in export.splitlines() if "=" in line)
    if values.get("USAGE") == "filesystem" and "TYPE" in values:
        return Known(values["TYPE"], values.get("UUID", ""))
    if "TYPE" in values:
        return Foreign(f"{values['TYPE']} ({values.get('USAGE', 'unknown use')})")
    return Foreign(f"a partition table ({values.get('PTTYPE', 'unknown')})")


async def _first_data(device: str, regions: tuple[Region, ...]) -> int | None:
    reader = str(Path(__file__).with_name("_first_data.py"))
    arguments = [f"{region.offset_bytes}:{region.length_bytes}" for region in regions]
    output = await run([sys.executable, "-I", "-S", reader, device, *arguments], timeout_s=PROBE_TIMEOUT_S)
    answer = output.stdout.strip()
    return None if answer == "blank" else int(answer)
