"""The mount table parser: every path the kernel can print comes back as it was."""

from __future__ import annotations

import contextlib
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import VduseError
from csi_vduse.node.mounts import (
    DeviceNumber,
    NodeFile,
    device_mounts,
    is_deleted_node,
    node_file,
    node_file_mounts,
    parse_mountinfo,
    read_mounts,
    top_mount,
    unescape,
)

TABLE = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro
24 22 0:6 / /dev rw,relatime shared:2 - devtmpfs devtmpfs rw,size=12334492k
42 22 252:16 / /stage/a rw,noatime shared:7 master:2 propagate_from:3 - ext4 /dev/vdb rw
43 22 252:16 / /pods/a ro,noatime - ext4 /dev/vdb rw
44 22 0:39 / /stage/b rw - btrfs /dev/vdc rw,subvolid=5,subvol=/
45 22 0:6 /vdd /pods/raw rw - devtmpfs devtmpfs rw
46 22 0:6 /vdd//deleted /pods/old rw - devtmpfs devtmpfs rw
47 22 0:50 / /stage/a\\040b rw - tmpfs tmp\\011fs rw
48 22 252:32 / /stage/a rw - xfs /dev/vdc rw
"""


def kernel_escape(path: bytes) -> str:
    """What fs/seq_file.c mangle_path does with the escape set of show_mountinfo."""
    return os.fsdecode(b"".join(b"\\%03o" % byte if byte in b" \t\n\\#" else bytes([byte]) for byte in path))


@given(st.binary(min_size=1).filter(lambda raw: b"\0" not in raw))
def test_every_path_survives_escaping_and_parsing(raw: bytes) -> None:
    line = f"9 1 0:5 {kernel_escape(raw)} {kernel_escape(raw)} rw - tmpfs {kernel_escape(raw)} rw\n"
    (mount,) = parse_mountinfo(line)
    assert os.fsencode(mount.root) == os.fsencode(mount.mount_point) == os.fsencode(mount.source) == raw


@given(st.text())
def test_parser_accepts_or_raises_its_own_error(text: str) -> None:
    with contextlib.suppress(VduseError):
        parse_mountinfo(text)


def test_optional_fields_of_any_number_are_skipped() -> None:
    mount = parse_mountinfo(TABLE)[2]
    assert (mount.fs_type, mount.source, mount.options) == ("ext4", "/dev/vdb", frozenset({"rw", "noatime"}))


def test_topmost_of_stacked_mounts_is_seen() -> None:
    mounts = parse_mountinfo(TABLE)
    top = top_mount(mounts, "/stage/a")
    assert top is not None
    assert top.fs_type == "xfs"
    assert top_mount(mounts, "/stage/none") is None


def test_mounts_of_a_device_are_found_by_number_and_for_btrfs_by_source() -> None:
    mounts = parse_mountinfo(TABLE)
    assert [m.mount_point for m in device_mounts(mounts, DeviceNumber(252, 16), "/dev/vdb")] == [
        "/stage/a",
        "/pods/a",
    ]
    assert [m.mount_point for m in device_mounts(mounts, DeviceNumber(252, 40), "/dev/vdc")] == ["/stage/b"]


def test_bind_mount_of_a_device_node_is_recognised_and_a_deleted_node_is_not() -> None:
    mounts = parse_mountinfo(TABLE)
    node = node_file(mounts, "/dev/vdd")
    assert node == NodeFile(DeviceNumber(0, 6), "/vdd")
    assert [m.mount_point for m in node_file_mounts(mounts, node)] == ["/pods/raw"]
    assert [m.mount_point for m in mounts if is_deleted_node(m)] == ["/pods/old"]


def test_read_only_view_of_a_writable_file_system_is_read_only() -> None:
    mounts = parse_mountinfo(TABLE)
    assert [m.read_only for m in mounts if m.device == DeviceNumber(252, 16)] == [False, True]


def test_unescape_leaves_what_is_no_escape() -> None:
    assert unescape(r"a\04x\08b") == r"a\04x\08b"


@pytest.mark.parametrize("line", ["garbage", "1 2 3:4 / / rw tmpfs x rw", "1 2 34 / / rw - tmpfs x rw"])
def test_line_of_unknown_form_is_an_error_that_shows_it(line: str) -> None:
    with pytest.raises(VduseError, match="unknown form"):
        parse_mountinfo(line)


def test_own_mount_table_is_readable() -> None:
    assert any(mount.mount_point == "/proc" for mount in read_mounts())
