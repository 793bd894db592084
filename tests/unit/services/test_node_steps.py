"""What a node does about an object: a table, from the object alone."""

from csi_vduse.errors import OutOfRange
from csi_vduse.kube.resources import FINALIZER
from csi_vduse.services.node_steps import Step, snapshot_step, volume_step
from csi_vduse.volumes.kubernetes_objects import error_status, volume_object
from tests.unit.volumes.test_registry_directory import a_volume

MIB = 1 << 20
READY = {"state": "Ready", "capacityBytes": MIB, "observedGeneration": 1}


def found(status=None, *, node="n1", going=False, generation=1, capacity=MIB):
    made = volume_object(a_volume(node=node, capacity_bytes=capacity))
    made["metadata"]["generation"] = generation
    if going:
        made["metadata"]["deletionTimestamp"] = "2026-11-26T00:00:00Z"
    return {**made, "status": status or {}}


def test_steps_of_a_volume():
    table = [
        ("gone", None, Step.NOTHING),
        ("of another node", found(node="n2"), Step.NOTHING),
        ("new", found(), Step.CREATE),
        ("interrupted", found({"state": "Creating", "capacityBytes": MIB}), Step.CREATE),
        ("failed: the controller deletes it", found({"state": "Failed"}), Step.NOTHING),
        ("as wanted", found(READY), Step.NOTHING),
        ("larger is wanted", found(READY, capacity=2 * MIB, generation=2), Step.EXPAND),
        (
            "larger is wanted and was refused",
            found({**READY, "error": error_status(OutOfRange("no"), 2)}, capacity=2 * MIB, generation=2),
            Step.NOTHING,
        ),
        (
            "a begun expansion is not wanted",
            found({**READY, "expandingToBytes": 2 * MIB}),
            Step.FORGET_EXPANSION,
        ),
        ("the limits changed", found(READY, generation=2), Step.OBSERVE),
        ("deleted while ready", found(READY, going=True), Step.DELETE),
        ("deleted before it was begun", found(going=True), Step.DELETE),
        ("deleted after it failed", found({"state": "Failed"}, going=True), Step.DELETE),
        ("deleted and done", found({"state": "Deleted"}, going=True), Step.NOTHING),
    ]
    assert {name: volume_step(each, "n1") for name, each, _ in table} == {
        name: step for name, _, step in table
    }


def test_a_ready_snapshot_stays_as_it_is():
    ready = {
        "metadata": {"name": "s", "finalizers": [FINALIZER]},
        "spec": {"nodeName": "n1"},
        "status": {"state": "Ready"},
    }
    assert snapshot_step(ready, "n1") is Step.NOTHING
    assert snapshot_step({**ready, "status": {}}, "n1") is Step.CREATE
