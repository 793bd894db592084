"""StorageClass parameters: bad ones are named together with what is allowed."""

import pytest

from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import InvalidArgument
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.model import VolumeParameters
from csi_vduse.volumes.parameters import AskedParameters, parse, parse_mutable


def test_no_parameters_give_the_defaults():
    assert parse({}).resolve() == VolumeParameters(Bus.VIRTIO, 0, 256, 512)


def test_every_parameter_is_read():
    asked = parse(
        {"pool": "fast", "bus": "vhost_vdpa", "queues": "4", "queueSize": "1024", "blockSize": "4096"}
    )
    assert asked == AskedParameters("fast", Bus.VHOST, 4, 1024, 4096)


def test_what_the_sidecars_add_is_ignored():
    assert (
        parse({"csi.storage.k8s.io/pvc/name": "x", "csi.storage.k8s.io/fstype": "xfs"}) == AskedParameters()
    )


@pytest.mark.parametrize(
    ("parameters", "named", "allowed"),
    [
        ({"colour": "red"}, "'colour'", "pool, bus, queues, queueSize, blockSize, maxIops"),
        ({"Pool": "a"}, "'Pool'", "pool"),
        ({"pool": ""}, "pool", "name"),
        ({"bus": "pci"}, "bus", "virtio_vdpa, vhost_vdpa"),
        ({"bus": ""}, "bus", "virtio_vdpa, vhost_vdpa"),
        ({"queues": "0"}, "queues", "1 to 16"),
        ({"queues": "17"}, "queues", "1 to 16"),
        ({"queues": "two"}, "queues", "1 to 16"),
        ({"queues": "1_0"}, "queues", "1 to 16"),
        ({"queues": "-1"}, "queues", "1 to 16"),
        ({"queues": "\u0664"}, "queues", "1 to 16"),
        ({"queues": "9" * 5000}, "queues", "1 to 16"),
        ({"queueSize": "100"}, "queueSize", "256, 512, 1024"),
        ({"queueSize": "2048"}, "queueSize", "256, 512, 1024"),
        ({"blockSize": "513"}, "blockSize", "512, 1024, 2048, 4096"),
        ({"maxIops": "-1"}, "maxIops", "0 (no limit) to 10000000"),
        ({"maxIops": "10000001"}, "maxIops", "0 (no limit) to 10000000"),
        ({"maxBandwidth": "fast"}, "maxBandwidth", "512M"),
        ({"maxBandwidth": "1"}, "maxBandwidth", "4096"),
        ({"maxBandwidth": "1P"}, "maxBandwidth", "68719476736"),
        ({"burstSeconds": "0"}, "burstSeconds", "0.01 to 3600"),
        ({"burstSeconds": "nan"}, "burstSeconds", "decimal"),
        ({"burstSeconds": "1e3"}, "burstSeconds", "decimal"),
        ({"burstSeconds": "3601"}, "burstSeconds", "0.01 to 3600"),
    ],
)
def test_bad_parameter_is_named_with_what_is_allowed(parameters, named, allowed):
    with pytest.raises(InvalidArgument) as caught:
        parse(parameters)
    assert named in str(caught.value)
    assert allowed in str(caught.value)


def test_limits_are_read():
    asked = parse({"maxIops": "500", "maxBandwidth": "10Mi", "burstSeconds": "1.5"})
    assert asked.throttle == Throttle(500, 10 << 20, 1.5)


def test_limits_that_are_not_named_stay():
    before = Throttle(500, 10 << 20, 1.5)
    assert parse_mutable({"maxBandwidth": "0"}, before) == Throttle(500, 0, 1.5)
    assert parse_mutable({}, before) == before


@pytest.mark.parametrize("key", ["queues", "pool", "iops", ""])
def test_only_limits_are_mutable(key):
    with pytest.raises(InvalidArgument, match="not mutable; allowed: maxIops, maxBandwidth, burstSeconds"):
        parse_mutable({key: "1"})


def test_limits_are_no_difference_since_they_change():
    assert parse({"maxIops": "5"}).difference("a", parse({}).resolve(), inherits=False) == ""


def test_a_clone_takes_the_block_size_of_its_source():
    assert parse({}).resolve(4096).block_size_bytes == 4096


def test_a_clone_cannot_have_larger_blocks_than_its_source():
    with pytest.raises(InvalidArgument, match="blockSize: 4096 exceeds the source's 512"):
        parse({"blockSize": "4096"}).resolve(512)


def test_difference_names_what_differs():
    existing = parse({"queues": "2"}).resolve()
    text = parse({"queues": "4", "pool": "b"}).difference("a", existing, inherits=False)
    assert text == "pool 'a', not 'b', queues 2, not 4"


def test_asking_for_a_default_in_words_is_no_difference():
    assert (
        parse({"bus": "virtio_vdpa", "queueSize": "256"}).difference("a", parse({}).resolve(), inherits=False)
        == ""
    )


def test_inherited_block_size_is_no_difference():
    existing = parse({}).resolve(4096)
    assert parse({}).difference("a", existing, inherits=True) == ""
    assert "blockSize" in parse({}).difference("a", existing, inherits=False)
