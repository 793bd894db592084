"""Pure decisions of the node: formatting by table, mount options."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import DataLoss, FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.node.formatting import Step, decide
from csi_vduse.node.options import check_options, combine
from csi_vduse.node.probe import Blank, Content, Foreign, HalfMade, Known, Unrecognised
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState

FORMATTED = FilesystemRecord("ext4", FilesystemState.FORMATTED)
OURS = "11111111-1111-4111-8111-111111111111"
OTHER = "22222222-2222-4222-8222-222222222222"
BEGUN = FilesystemRecord("ext4", FilesystemState.FORMATTING, OURS)
BEGUN_WITHOUT_UUID = FilesystemRecord("ext4", FilesystemState.FORMATTING)
GPT = Foreign("a partition table (gpt)")
CONTENTS: list[Content] = [Blank(), Known("ext4"), Known("ext4", OURS), Known("xfs"), GPT, Unrecognised(512)]


@pytest.mark.parametrize(
    ("record", "content", "step"),
    [
        (None, Blank(), Step.FORMAT),
        (None, Known("ext4"), Step.RECORD),
        (None, Known("xfs"), FailedPrecondition),
        (None, GPT, FailedPrecondition),
        (None, Unrecognised(512), FailedPrecondition),
        (FORMATTED, Known("ext4", OTHER), Step.NOTHING),
        (FORMATTED, Blank(), DataLoss),
        (FORMATTED, Known("xfs"), DataLoss),
        (FORMATTED, GPT, DataLoss),
        (FORMATTED, Unrecognised(512), DataLoss),
        (FilesystemRecord("xfs", FilesystemState.FORMATTED), Known("xfs"), FailedPrecondition),
        (BEGUN, Blank(), Step.FORMAT),
        (BEGUN, Unrecognised(512), Step.WIPE_AND_FORMAT),
        (BEGUN, HalfMade("ext4", OURS), Step.WIPE_AND_FORMAT),
        (BEGUN, Known("ext4", OURS), Step.RECORD),
        (BEGUN, Known("ext4", OTHER), DataLoss),
        (BEGUN, Known("ext4"), DataLoss),
        (BEGUN, Known("xfs", OURS), DataLoss),
        (BEGUN, GPT, DataLoss),
        (FilesystemRecord("xfs", FilesystemState.FORMATTING, OURS), Known("xfs", OURS), FailedPrecondition),
        (
            FilesystemRecord("xfs", FilesystemState.FORMATTING, OURS),
            HalfMade("xfs", OURS),
            Step.WIPE_AND_FORMAT,
        ),
        (BEGUN_WITHOUT_UUID, Blank(), Step.FORMAT),
        (BEGUN_WITHOUT_UUID, Known("ext4", OTHER), Step.RECORD),
        (BEGUN_WITHOUT_UUID, Known("xfs"), FailedPrecondition),
        (BEGUN_WITHOUT_UUID, GPT, FailedPrecondition),
        (BEGUN_WITHOUT_UUID, Unrecognised(512), FailedPrecondition),
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


@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("record", [None, FORMATTED, BEGUN, BEGUN_WITHOUT_UUID])
@pytest.mark.parametrize("wanted", ["ext4", "xfs"])
def test_a_known_mark_is_never_wiped_on_the_record_s_word(
    record: FilesystemRecord | None, content: Content, wanted: str
) -> None:
    """HalfMade is the file system's own word, and not among them."""
    try:
        step = decide(record, content, wanted, read_only=False)
    except VduseError:
        return
    assert step in {Step.NOTHING, Step.RECORD} or isinstance(content, Blank | Unrecognised)


@pytest.mark.parametrize("record", [None, FORMATTED, BEGUN, BEGUN_WITHOUT_UUID])
@pytest.mark.parametrize("content", CONTENTS)
def test_read_only_volume_is_never_written(record: FilesystemRecord | None, content: Content) -> None:
    try:
        step = decide(record, content, "ext4", read_only=True)
    except VduseError:
        return
    assert step is Step.NOTHING
    assert isinstance(content, Known)
    assert content.fs_type == "ext4"


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
