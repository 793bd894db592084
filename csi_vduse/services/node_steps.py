"""What a node has to do about an object of its pools: decided from the object alone. Pure."""

from __future__ import annotations

from enum import Enum, auto

from csi_vduse.kube.resources import SNAPSHOTS, Object, Resource, is_going
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.model import State


class Step(Enum):
    """One act; each may be repeated after a crash."""

    NOTHING = auto()
    CREATE = auto()
    DELETE = auto()
    EXPAND = auto()
    FORGET_EXPANSION = auto()  # one that was begun and is not wanted any more: frees the promised room
    OBSERVE = auto()  # the spec changed in what an attached volume follows: its limits


def volume_step(found: Object | None, node: str) -> Step:
    """Decide about a volume.

    Args:
        found: the object, or None if it is gone.
        node: ours.
    """
    if found is None or found["spec"].get("nodeName", "") != node:
        return Step.NOTHING
    begun = _begun(found)
    if begun is not None:
        return begun
    spec, status = found["spec"], found["status"]
    refused = objects.error_from_status(found) is not None
    capacity_bytes, wanted_bytes = int(status["capacityBytes"]), int(spec["capacityBytes"])
    if wanted_bytes > capacity_bytes and not refused:
        return Step.EXPAND
    if status.get("expandingToBytes"):
        return Step.FORGET_EXPANSION
    if status.get("observedGeneration") != found["metadata"].get("generation") and not refused:
        return Step.OBSERVE
    return Step.NOTHING


def snapshot_step(found: Object | None, node: str) -> Step:
    """Decide about a snapshot; as volume_step."""
    if found is None or found["spec"].get("nodeName", "") != node:
        return Step.NOTHING
    return _begun(found) or Step.NOTHING


def is_copy(resource: Resource, found: Object, step: Step) -> bool:
    """Tell whether a step moves the bytes of another object, which may take hours."""
    return step is Step.CREATE and (resource is SNAPSHOTS or bool(found["spec"].get("source")))


def _begun(found: Object) -> Step | None:
    """Decide as far as it is the same for both kinds; None: it is ready and stays."""
    if is_going(found):
        return Step.NOTHING if objects.has_state(found, objects.DELETED) else Step.DELETE
    if objects.has_state(found, objects.FAILED):
        return Step.NOTHING
    return None if objects.recorded_state(found) is State.READY else Step.CREATE
