"""A caller built against CSI 1.12 reads the volume condition; one built against 1.13 does not notice it.

The 1.12 caller is a descriptor pool of its own in which the messages have the fields that 1.13 reserved. The
numbers stand here a second time on purpose: they are what old callers were compiled with.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from csi_vduse.proto import compat, csi_pb2

if TYPE_CHECKING:
    from google.protobuf.message import Message

_Field = descriptor_pb2.FieldDescriptorProto


def _field(
    name: str, number: int, kind: str, *, repeated: bool = False
) -> descriptor_pb2.FieldDescriptorProto:
    """Describe a field; kind is a scalar type such as "bool", or the name of a message."""
    label = _Field.LABEL_REPEATED if repeated else _Field.LABEL_OPTIONAL
    if kind[0].isupper():
        return _Field(
            name=name, number=number, label=label, type=_Field.TYPE_MESSAGE, type_name=f".old.{kind}"
        )
    return _Field(name=name, number=number, label=label, type=_Field.Type.Value(f"TYPE_{kind.upper()}"))


_MESSAGES_OF_1_12 = {
    "VolumeCondition": [_field("abnormal", 1, "bool"), _field("message", 2, "string")],
    "VolumeUsage": [_field("available", 1, "int64"), _field("total", 2, "int64")],
    "NodeGetVolumeStatsResponse": [
        _field("usage", 1, "VolumeUsage", repeated=True),
        _field("volume_condition", 2, "VolumeCondition"),
    ],
    "VolumeStatus": [
        _field("published_node_ids", 1, "string", repeated=True),
        _field("volume_condition", 2, "VolumeCondition"),
    ],
    "ControllerGetVolumeResponse": [_field("status", 2, "VolumeStatus")],
    "RPC": [_field("type", 1, "int32")],
    "Capability": [_field("rpc", 1, "RPC")],
}


def _old_file() -> descriptor_pb2.FileDescriptorProto:
    messages = [
        descriptor_pb2.DescriptorProto(name=name, field=fields) for name, fields in _MESSAGES_OF_1_12.items()
    ]
    return descriptor_pb2.FileDescriptorProto(
        name="old.proto", package="old", syntax="proto3", message_type=messages
    )


_OLD = descriptor_pool.DescriptorPool()
_OLD.Add(_old_file())


def as_seen_by_1_12(message_name: str, sent: Message) -> Any:
    """Decode the bytes of an answer as a caller of 1.12 does."""
    shape = message_factory.GetMessageClass(_OLD.FindMessageTypeByName(f"old.{message_name}"))
    return shape.FromString(sent.SerializeToString())


def stats() -> csi_pb2.NodeGetVolumeStatsResponse:
    usage = csi_pb2.VolumeUsage(available=3, total=7, unit=csi_pb2.VolumeUsage.BYTES)
    return csi_pb2.NodeGetVolumeStatsResponse(usage=[usage])


@pytest.mark.parametrize("abnormal", [True, False])
def test_1_12_caller_reads_the_condition_beside_the_usage(abnormal: bool) -> None:
    answer = compat.with_volume_condition(stats(), abnormal=abnormal, message="worker restarts")

    seen = as_seen_by_1_12("NodeGetVolumeStatsResponse", answer)

    assert seen.HasField("volume_condition")
    assert (seen.volume_condition.abnormal, seen.volume_condition.message) == (abnormal, "worker restarts")
    assert [(usage.available, usage.total) for usage in seen.usage] == [(3, 7)]


def test_1_12_caller_reads_the_condition_in_a_volume_status() -> None:
    answer = csi_pb2.ControllerGetVolumeResponse()
    answer.status.published_node_ids.append("node-a")
    compat.with_volume_condition(answer.status, abnormal=True, message="pool full")

    seen = as_seen_by_1_12("ControllerGetVolumeResponse", answer).status

    assert list(seen.published_node_ids) == ["node-a"]
    assert (seen.volume_condition.abnormal, seen.volume_condition.message) == (True, "pool full")


def test_1_12_caller_reads_the_condition_in_a_list_entry() -> None:
    entry = csi_pb2.ListVolumesResponse.Entry()
    compat.with_volume_condition(entry.status, abnormal=True, message="pool full")

    assert as_seen_by_1_12("VolumeStatus", entry.status).volume_condition.message == "pool full"


def test_condition_added_last_wins_even_when_it_says_healthy() -> None:
    answer = compat.with_volume_condition(stats(), abnormal=True, message="worker restarts")
    compat.with_volume_condition(answer, abnormal=False, message="volume works")

    seen = as_seen_by_1_12("NodeGetVolumeStatsResponse", answer)

    assert (seen.volume_condition.abnormal, seen.volume_condition.message) == (False, "volume works")


def test_1_13_caller_sees_the_usage_only() -> None:
    answer = compat.with_volume_condition(stats(), abnormal=True, message="worker restarts")

    seen = csi_pb2.NodeGetVolumeStatsResponse.FromString(answer.SerializeToString())
    seen.DiscardUnknownFields()

    assert seen == stats()


def test_condition_without_a_message_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a message"):
        compat.with_volume_condition(stats(), abnormal=False, message="")


def test_old_capability_numbers_reach_the_wire() -> None:
    node = as_seen_by_1_12("Capability", compat.node_volume_condition_capability())
    controller = as_seen_by_1_12("Capability", compat.controller_volume_condition_capability())

    assert (node.rpc.type, controller.rpc.type) == (4, 11)
