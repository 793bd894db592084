"""Answer callers that were built against CSI 1.12 and still read the volume condition.

CSI 1.13 reserved the condition's field and capability numbers in favour of the health calls. Kubelets and
monitors in the field still speak 1.12, so a csi-vduse answer carries both. Keeps true: what is added here
is invisible to a 1.13 reader (an unknown field), and to a 1.12 reader looks as if we were built with 1.12.

Source: CSI 1.12.0, `VolumeCondition` and the fields that held it; proto/csi_compat.proto has the numbers.
"""

from __future__ import annotations

from typing import TypeVar, cast

from csi_vduse.proto import csi_compat_pb2, csi_pb2

# The three messages that had the condition, at the same number.
ConditionHolder = TypeVar(
    "ConditionHolder",
    csi_pb2.NodeGetVolumeStatsResponse,
    csi_pb2.ListVolumesResponse.VolumeStatus,
    csi_pb2.ControllerGetVolumeResponse.VolumeStatus,
)


def with_volume_condition(response: ConditionHolder, *, abnormal: bool, message: str) -> ConditionHolder:
    """Add the 1.12 volume condition to an answer, in place, and return the same object.

    The condition becomes an unknown field of the message; serializing keeps it. A second call wins over the
    first. In ControllerGetVolume and ListVolumes pass the `status` of the answer or entry.

    Args:
        response: what is about to be sent.
        abnormal: True if the volume does not work as it should.
        message: sentence for people; 1.12 requires one for a healthy volume too.

    Raises:
        ValueError: the message is empty.
    """
    if not message:
        raise ValueError("a volume condition needs a message, for a healthy volume too")
    lost = csi_compat_pb2.ConditionHolder(
        volume_condition=csi_compat_pb2.VolumeCondition(abnormal=abnormal, message=message)
    )
    response.MergeFromString(lost.SerializeToString())
    return response


def controller_volume_condition_capability() -> csi_pb2.ControllerServiceCapability:
    """Return the 1.12 controller capability that says: volume lists and look-ups have a condition."""
    old_number = csi_compat_pb2.CONTROLLER_CAPABILITY_VOLUME_CONDITION
    # The enum is open on the wire (proto3): a number without a name is kept as it is.
    kind = cast("csi_pb2.ControllerServiceCapability.RPC.Type.ValueType", old_number)
    return csi_pb2.ControllerServiceCapability(rpc=csi_pb2.ControllerServiceCapability.RPC(type=kind))


def node_volume_condition_capability() -> csi_pb2.NodeServiceCapability:
    """Return the 1.12 node capability that says: NodeGetVolumeStats has a condition."""
    old_number = csi_compat_pb2.NODE_CAPABILITY_VOLUME_CONDITION
    kind = cast("csi_pb2.NodeServiceCapability.RPC.Type.ValueType", old_number)
    return csi_pb2.NodeServiceCapability(rpc=csi_pb2.NodeServiceCapability.RPC(type=kind))
