"""The configuration space has the fields of VIRTIO 1.3, 5.2.4, at their offsets."""

import struct

import pytest

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.errors import InvalidArgument


def encode(**changes: int) -> bytes:
    values = {"capacity_bytes": 1 << 30, "block_size_bytes": 512, "queues": 2, "queue_size": 256}
    return config_space.encode(**{**values, **changes})


@pytest.mark.parametrize(
    ("offset", "layout", "expected"),
    [
        (0, "<Q", (1 << 30) // 512),
        (12, "<I", 254),
        (20, "<I", 512),
        (24, "<B", 3),
        (34, "<H", 2),
        (40, "<I", 32),
        (52, "<I", 32),
        (56, "<B", 1),
    ],
)
def test_field_is_where_the_specification_puts_it(offset, layout, expected):
    assert struct.unpack_from(layout, encode(), offset)[0] == expected


def test_physical_block_is_4096_whatever_the_logical_one():
    assert [encode(block_size_bytes=size)[24] for size in config_space.BLOCK_SIZES] == [3, 2, 1, 0]


def test_read_only_device_offers_nothing_that_writes():
    features = config_space.features(queues=1, read_only=True, discard=True)
    assert features & config_space.F_RO
    assert not features & (config_space.F_DISCARD | config_space.F_WRITE_ZEROES)


def test_what_vduse_insists_on_is_always_offered():
    features = config_space.features(queues=1, read_only=False, discard=False)
    assert features & config_space.F_ACCESS_PLATFORM
    assert features & config_space.F_VERSION_1
    assert not features & 1 << 11  # CONFIG_WCE


def test_packed_rings_are_offered_when_asked_for():
    offered = [
        config_space.features(queues=1, read_only=False, discard=True, packed=p) for p in (False, True)
    ]
    assert [features & config_space.F_RING_PACKED for features in offered] == [0, config_space.F_RING_PACKED]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"name": "a/b"}, "a/b"),
        ({"name": ".."}, ".."),
        ({"name": "control"}, "control"),
        ({"name": "x" * 256}, "xxx"),
        ({"queues": 0}, "0 queues"),
        ({"queue_size": 100}, "100"),
        ({"block_size_bytes": 513}, "513"),
        ({"capacity_bytes": 0}, "0 bytes"),
        ({"capacity_bytes": 1000}, "1000"),
    ],
)
def test_impossible_device_is_refused_by_name(change, named):
    with pytest.raises(InvalidArgument, match=named):
        DeviceSpec(**{"name": "v", "capacity_bytes": 1 << 20, **change})
