"""The access-mode policy, as the table of docs/parameters.md."""

import pytest

from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.policy import FILESYSTEMS, AccessMode, Use, objection

SINGLE_NODE = {
    AccessMode.SINGLE_NODE_WRITER,
    AccessMode.SINGLE_NODE_READER_ONLY,
    AccessMode.SINGLE_NODE_SINGLE_WRITER,
    AccessMode.SINGLE_NODE_MULTI_WRITER,
}


@pytest.mark.parametrize("mode", AccessMode)
@pytest.mark.parametrize("filesystem", [None, "ext4"])
def test_a_file_volume_is_for_one_node(mode, filesystem):
    reason = objection(Use(mode, filesystem), backend="file", bus=Bus.VIRTIO)
    assert (reason == "") == (mode in SINGLE_NODE)
    if reason:
        assert mode.name in reason
        assert all(allowed.name in reason for allowed in SINGLE_NODE)


@pytest.mark.parametrize("mode", AccessMode)
@pytest.mark.parametrize("filesystem", [None, "ext4"])
def test_an_nbd_volume_is_for_many_readers_or_for_the_disk_of_a_vm_that_moves(mode, filesystem):
    allowed = SINGLE_NODE | {AccessMode.MULTI_NODE_READER_ONLY}
    if filesystem is None:
        allowed |= {AccessMode.MULTI_NODE_MULTI_WRITER}
    reason = objection(Use(mode, filesystem), backend="nbd", bus=Bus.VIRTIO)
    assert (reason == "") == (mode in allowed)


def test_many_writers_of_a_file_system_are_refused_with_the_reason():
    reason = objection(Use(AccessMode.MULTI_NODE_MULTI_WRITER, "ext4"), backend="nbd", bus=Bus.VIRTIO)
    assert "raw block only" in reason
    assert "destroyed" in reason


@pytest.mark.parametrize("filesystem", FILESYSTEMS)
def test_every_file_system_of_ours_can_be_mounted(filesystem):
    assert not objection(Use(AccessMode.SINGLE_NODE_WRITER, filesystem), backend="file", bus=Bus.VIRTIO)


def test_unknown_file_system_is_refused_with_the_allowed_ones():
    reason = objection(Use(AccessMode.SINGLE_NODE_WRITER, "ntfs"), backend="file", bus=Bus.VIRTIO)
    assert "ntfs" in reason
    assert "ext4, xfs, btrfs" in reason


def test_a_vms_disk_is_a_block_device_only():
    writer = AccessMode.SINGLE_NODE_WRITER
    assert not objection(Use(writer, None), backend="file", bus=Bus.VHOST)
    assert "volumeMode: Block" in objection(Use(writer, "ext4"), backend="file", bus=Bus.VHOST)
