"""The check against the official descriptors notices what it is there to notice."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from google.protobuf import descriptor_pb2

from csi_vduse.proto import csi_compat_pb2, csi_pb2

if TYPE_CHECKING:
    from collections.abc import Callable

_TOOL = Path(__file__).parents[3] / "tools" / "check_csi_proto.py"
_File = descriptor_pb2.FileDescriptorProto


def _load() -> Any:
    spec = importlib.util.spec_from_file_location("check_csi_proto", _TOOL)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


check = _load()


def csi() -> _File:
    return _File.FromString(csi_pb2.DESCRIPTOR.serialized_pb)


def _message(file: _File, name: str) -> descriptor_pb2.DescriptorProto:
    return next(message for message in file.message_type if message.name == name)


def _renumber(file: _File) -> None:
    _message(file, "Volume").field[0].number = 99


def _retype(file: _File) -> None:
    _message(file, "Volume").field[0].type = descriptor_pb2.FieldDescriptorProto.TYPE_INT32


def _relabel(file: _File) -> None:
    _message(file, "Volume").field[0].label = descriptor_pb2.FieldDescriptorProto.LABEL_REPEATED


def _leave_oneof(file: _File) -> None:
    _message(file, "VolumeCapability").field[0].ClearField("oneof_index")


def _unreserve(file: _File) -> None:
    _message(file, "NodeGetVolumeStatsResponse").ClearField("reserved_range")


def _unmark_secret(file: _File) -> None:
    fields = _message(file, "DeleteVolumeRequest").field
    next(field for field in fields if field.name == "secrets").ClearField("options")


def _rename_enum_value(file: _File) -> None:
    next(enum for enum in file.enum_type if enum.name == "VolumeHealthErrorType").value[1].name = "WORSE"


def _drop_streaming(file: _File) -> None:
    service = next(service for service in file.service if service.name == "SnapshotMetadata")
    service.method[0].server_streaming = False


def _drop_method(file: _File) -> None:
    del file.service[0].method[0]


def _renumber_extension(file: _File) -> None:
    file.extension[0].number = 1061


@pytest.mark.parametrize(
    "change",
    [
        _renumber,
        _retype,
        _relabel,
        _leave_oneof,
        _unreserve,
        _unmark_secret,
        _rename_enum_value,
        _drop_streaming,
        _drop_method,
        _renumber_extension,
    ],
)
def test_a_changed_descriptor_is_a_difference(change: Callable[[_File], None]) -> None:
    changed = csi()
    change(changed)

    assert check.differences(check.facts(csi()), check.facts(changed))


def test_the_order_of_declarations_is_no_difference() -> None:
    turned = csi()
    messages = list(reversed(turned.message_type))
    turned.ClearField("message_type")
    turned.message_type.extend(messages)

    assert check.differences(check.facts(csi()), check.facts(turned)) == []


def test_a_lost_field_of_the_previous_version_is_a_difference() -> None:
    ours = check.facts(csi())
    compat = check.facts(_File.FromString(csi_compat_pb2.DESCRIPTOR.serialized_pb))
    previous = {**ours, "field csi.v1.Volume.gone": "optional string = 9"}

    lines = check.compat_differences(ours, compat, previous)

    assert [line for line in lines if line.startswith("lost:")] == [
        "lost: field csi.v1.Volume.gone: `optional string = 9` is in neither csi.proto nor csi_compat.proto"
    ]
