"""Pure decisions of the node: formatting by table, mount options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import DataLoss, FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.node.formatting import Step, decide
from csi_vduse.node.options import check_options, combine
from csi_vduse.node.probe import Blank, Content, Foreign, Known
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState

FORMATTED = FilesystemRecord("ext4", FilesystemState.FORMATTED)
FORMATTING = FilesystemRecord("ext4", FilesystemState.FORMATTING)
CONTENTS: list[Content] = [Blank(), Known("ext4"), Known("xfs"), Foreign("a partition table (gpt)")]


@pytest.mark.parametrize(
    ("record", "content", "step"),
    [
        (None, Blank(), Step.FORMAT),
        (None, Known("ext4"), Step.RECORD),
        (None, Known("xfs"), FailedPrecondition),
        (None, Foreign("x"), FailedPrecondition),
        (FORMATTED, Known("ext4"), Step.NOTHING),
        (FORMATTED, Blank(), DataLoss),
        (FORMATTED, Known("xfs"), DataLoss),
        (FORMATTED, Foreign("x"), DataLoss),
        (FilesystemRecord("xfs", FilesystemState.FORMATTED), Known("xfs"), FailedPrecondition),
        *((FORMATTING, content, Step.WIPE_AND_FORMAT) for content in CONTENTS),
    ],
)
def test_what_is_done_with_a_writable_volume(
    record: FilesystemRecord | None, content: Content, step: Step | type[VduseError]
) -> None:
    if isinstance(step, Step):
        assert decide(record, content, "ext4", read_only=False) is step
    else:
        with pytest.raises(step):
            decide(record, content, "ext4", read_only=False)


@pytest.mark.parametrize("record", [None, FORMATTED, FORMATTING])
@pytest.mark.parametrize("content", CONTENTS)
def test_read_only_volume_is_never_written(record: FilesystemRecord | None, content: Content) -> None:
    try:
        step = decide(record, content, "ext4", read_only=True)
    except VduseError:
        return
    assert step is Step.NOTHING
    assert content == Known("ext4")


@pytest.mark.parametrize(
    "option",
    [
        "noatime",
        "commit=30",
        "data=writeback",
        'context="system_u:object_r:t:s0:c1,c2"',
        "subvol=/a/b",
        "X-mount.mkdir",
    ],
)
def test_ordinary_option_is_taken(option: str) -> None:
    check_options([option])


@pytest.mark.parametrize(
    "option",
    [
        "",
        "a,b",
        "a b",
        "a\nb",
        "-o",
        "a=b,c",
        'a="b',
        "a=$(x)",
        "a;b",
        "remount",
        "bind",
        "loop=/dev/loop0",
        "device=/dev/sda",
    ],
)
def test_option_that_would_do_something_else_is_refused(option: str) -> None:
    with pytest.raises(InvalidArgument, match="mount option"):
        check_options([option])


def test_refusal_does_not_repeat_a_value_that_may_be_secret() -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_options(["password=hunter 2"])
    assert "hunter" not in str(caught.value)


def test_options_are_put_together_once_each_with_ours_first() -> None:
    assert combine(("nouuid",), ("noatime", "nouuid"), read_only=True) == ("ro", "nouuid", "noatime")


def test_rw_contradicts_a_read_only_mode() -> None:
    with pytest.raises(InvalidArgument, match="contradicts"):
        combine((), ("rw",), read_only=True)


@given(st.text())
def test_accepted_option_is_one_argument_part_for_mount(text: str) -> None:
    try:
        check_options([text])
    except InvalidArgument:
        return
    unquoted = text.split('"')[0::2]
    assert "," not in "".join(unquoted)
    assert text.count('"') % 2 == 0
    assert text.isprintable()
    assert not text.startswith("-")
