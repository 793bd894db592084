"""Locks: what meets what, decided by the ids in the request."""

import pytest

from csi_vduse.errors import Pending
from csi_vduse.proto import csi_pb2
from csi_vduse.services.locks import Keys, LockTable, keys_of
from csi_vduse.volumes.ids import snapshot_id, volume_id
from tests.unit.services.stack import create_request

V, OTHER, S = volume_id("v"), volume_id("other"), snapshot_id("s")

CREATE = ("CreateVolume", create_request("v"))
CLONE = ("CreateVolume", create_request("clone", from_volume=V))
RESTORE = ("CreateVolume", create_request("restored", from_snapshot=S))
RESTORE_AGAIN = ("CreateVolume", create_request("again", from_snapshot=S))
DELETE = ("DeleteVolume", csi_pb2.DeleteVolumeRequest(volume_id=V))
EXPAND = ("ControllerExpandVolume", csi_pb2.ControllerExpandVolumeRequest(volume_id=V))
MODIFY = ("ControllerModifyVolume", csi_pb2.ControllerModifyVolumeRequest(volume_id=V))
STAGE = ("NodeStageVolume", csi_pb2.NodeStageVolumeRequest(volume_id=V))
PUBLISH = ("NodePublishVolume", csi_pb2.NodePublishVolumeRequest(volume_id=V))
STAGE_OTHER = ("NodeStageVolume", csi_pb2.NodeStageVolumeRequest(volume_id=OTHER))
SNAPSHOT = ("CreateSnapshot", csi_pb2.CreateSnapshotRequest(source_volume_id=V, name="s"))
SAME_NAME = ("CreateSnapshot", csi_pb2.CreateSnapshotRequest(source_volume_id=OTHER, name="s"))
DELETE_SNAPSHOT = ("DeleteSnapshot", csi_pb2.DeleteSnapshotRequest(snapshot_id=S))
STATS = ("NodeGetVolumeStats", csi_pb2.NodeGetVolumeStatsRequest(volume_id=V))
GET = ("ControllerGetVolume", csi_pb2.ControllerGetVolumeRequest(volume_id=V))


@pytest.mark.parametrize(
    ("running", "coming", "refused"),
    [
        (CREATE, CREATE, True),
        (CREATE, DELETE, True),
        (STAGE, DELETE, True),
        (STAGE, PUBLISH, True),
        (STAGE, STAGE_OTHER, False),
        (EXPAND, STAGE, True),
        (SNAPSHOT, STAGE, False),
        (SNAPSHOT, PUBLISH, False),
        (SNAPSHOT, MODIFY, False),
        (SNAPSHOT, CLONE, False),
        (SNAPSHOT, DELETE, True),
        (SNAPSHOT, EXPAND, True),
        (EXPAND, SNAPSHOT, True),
        (CREATE, CLONE, True),
        (CLONE, STAGE, False),
        (CLONE, EXPAND, True),
        (SNAPSHOT, SAME_NAME, True),
        (SNAPSHOT, DELETE_SNAPSHOT, True),
        (SNAPSHOT, RESTORE, True),
        (CLONE, CLONE, True),
        (CLONE, DELETE, True),
        (RESTORE, RESTORE_AGAIN, False),
        (RESTORE, DELETE_SNAPSHOT, True),
        (DELETE_SNAPSHOT, RESTORE, True),
        (RESTORE, CREATE, False),
        (STAGE, STATS, False),
        (DELETE, GET, False),
    ],
)
def test_calls_for_one_object_do_not_run_together(running, coming, refused):
    table = LockTable()
    running_keys, coming_keys = keys_of(*running), keys_of(*coming)
    table.acquire(running_keys)
    if not refused:
        if coming_keys is not None:
            table.acquire(coming_keys)
        return
    with pytest.raises(Pending, match="is running"):
        table.acquire(coming_keys)
    table.release(running_keys)
    table.acquire(coming_keys)
    table.release(coming_keys)
    assert not table.held


def test_a_refused_call_takes_nothing():
    table = LockTable()
    table.acquire(Keys(frozenset({"b"})))
    with pytest.raises(Pending):
        table.acquire(Keys(frozenset({"a", "b"}), frozenset({"c"})))
    assert set(table.held) == {"b"}


def test_a_shared_object_is_free_when_the_last_user_ends():
    table = LockTable()
    shared, alone = Keys(shared=frozenset({"s"})), Keys(frozenset({"s"}))
    table.acquire(shared)
    table.acquire(shared)
    table.release(shared)
    with pytest.raises(Pending):
        table.acquire(alone)
    table.release(shared)
    table.acquire(alone)


def test_a_request_without_ids_locks_nothing():
    for method, request in (
        ("CreateVolume", csi_pb2.CreateVolumeRequest()),
        ("CreateSnapshot", csi_pb2.CreateSnapshotRequest()),
        ("DeleteVolume", csi_pb2.DeleteVolumeRequest()),
    ):
        assert keys_of(method, request) == Keys()
