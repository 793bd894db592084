"""Sizes: always what was asked for, rounded, or a clear refusal."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import OutOfRange
from csi_vduse.volumes.sizes import (
    DEFAULT_BYTES,
    GRANULE_BYTES,
    MAX_BYTES,
    MIN_BYTES,
    CapacityRange,
    choose,
    floor_bytes,
    round_up,
)

MIB = 1 << 20
sizes = st.integers(min_value=0, max_value=(1 << 63) - 1)


def chosen(required=0, limit=0, smallest=MIN_BYTES, default=DEFAULT_BYTES):
    return choose(CapacityRange(required, limit), smallest_bytes=smallest, default_bytes=default)


@given(sizes)
def test_rounding_adds_less_than_one_granule(size):
    assert round_up(size) % GRANULE_BYTES == 0
    assert 0 <= round_up(size) - size < GRANULE_BYTES


@given(sizes, sizes, st.integers(min_value=1, max_value=1 << 40))
def test_chosen_size_meets_the_range_or_is_refused(required, limit, smallest):
    if limit and limit < required:
        return  # refused by validation before
    try:
        size = chosen(required, limit, smallest)
    except OutOfRange:
        assert limit or required > MAX_BYTES
        return
    assert CapacityRange(required, limit).allows(size)
    assert size >= smallest
    assert size % GRANULE_BYTES == 0


@given(sizes, sizes)
def test_a_retry_with_the_same_range_accepts_the_chosen_size(required, limit):
    if limit and limit < required:
        return
    try:
        size = chosen(required, limit)
    except OutOfRange:
        return
    assert CapacityRange(required, limit).allows(size)


def test_nothing_asked_gives_the_default():
    assert chosen() == DEFAULT_BYTES


def test_a_limit_below_the_default_wins():
    assert chosen(limit=10 * MIB + 1) == 10 * MIB


def test_one_byte_gives_the_smallest_volume():
    assert chosen(required=1) == MIN_BYTES


def test_odd_size_is_rounded_up():
    assert chosen(required=5 * MIB + 1) == 5 * MIB + GRANULE_BYTES


def test_limit_that_forbids_rounding_is_out_of_range():
    with pytest.raises(OutOfRange, match="the limit is 5242881"):
        chosen(required=5 * MIB + 1, limit=5 * MIB + 1)


def test_size_beyond_a_file_offset_is_out_of_range():
    with pytest.raises(OutOfRange, match="more than a volume can have"):
        chosen(required=(1 << 63) - 1)


@pytest.mark.parametrize(
    ("filesystems", "expected"),
    [
        ([], MIN_BYTES),
        ([None], MIN_BYTES),
        (["ext4"], MIN_BYTES),
        (["xfs", None], 300 * MIB),
        (["btrfs"], 128 * MIB),
    ],
)
def test_floor_is_what_the_neediest_file_system_needs(filesystems, expected):
    assert floor_bytes(filesystems) == expected
