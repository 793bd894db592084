#!/usr/bin/env python3
"""Hold proto/csi.proto and proto/csi_compat.proto against the official CSI descriptors.

    python tools/check_csi_proto.py

Exit 0: no difference, or "skipped: ..." if Go or the official module cannot be had. Exit 1: every difference
on a line of its own. Compared are all names, numbers, types, labels, oneofs, reserved ranges, options,
extensions, services and streaming; not compared are order, comments and options for other languages.

The official descriptors come from the Go module of the specification, printed by tools/csi-descriptor: the
version that we speak for csi.proto, the one before it for csi_compat.proto.
"""

from __future__ import annotations

import asyncio
import base64
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from google.protobuf import descriptor_pb2, text_format

from csi_vduse.errors import CommandFailed, DeadlineExceeded, FailedPrecondition
from csi_vduse.proto import csi_compat_pb2, csi_pb2
from csi_vduse.run import run

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

DESCRIPTOR_DIR = Path(__file__).resolve().parent / "csi-descriptor"
CURRENT, PREVIOUS = "go.mod", "previous.mod"
# Compiling the module on a small machine takes a minute; a download may be slow.
TIMEOUT_S = 550.0

_Options = (
    descriptor_pb2.MessageOptions
    | descriptor_pb2.FieldOptions
    | descriptor_pb2.EnumOptions
    | descriptor_pb2.EnumValueOptions
    | descriptor_pb2.ServiceOptions
    | descriptor_pb2.MethodOptions
)

_CONDITION = "ConditionHolder.volume_condition"
# 1.12 -> ours: what 1.13 took away, and the csi_compat.proto element that stands for it. Anything else that
# 1.12 has and we have not is a difference.
LOST_SINCE_PREVIOUS = {
    "field csi.v1.NodeGetVolumeStatsResponse.volume_condition": _CONDITION,
    "field csi.v1.ListVolumesResponse.VolumeStatus.volume_condition": _CONDITION,
    "field csi.v1.ControllerGetVolumeResponse.VolumeStatus.volume_condition": _CONDITION,
    "field csi.v1.VolumeCondition.abnormal": "VolumeCondition.abnormal",
    "field csi.v1.VolumeCondition.message": "VolumeCondition.message",
    "value csi.v1.ControllerServiceCapability.RPC.Type.VOLUME_CONDITION": (
        "ControllerCapability.CONTROLLER_CAPABILITY_VOLUME_CONDITION"
    ),
    "value csi.v1.NodeServiceCapability.RPC.Type.VOLUME_CONDITION": (
        "NodeCapability.NODE_CAPABILITY_VOLUME_CONDITION"
    ),
    "message csi.v1.VolumeCondition": "VolumeCondition",
}

Facts = dict[str, str]


class UnavailableError(Exception):
    """The official descriptors cannot be had on this machine; the text says why."""


def facts(file: descriptor_pb2.FileDescriptorProto) -> Facts:
    """Flatten a file descriptor into "kind full.name" -> everything that matters about it, as text."""
    found = dict(_enum_facts(file.package, file.enum_type))
    found["syntax"] = file.syntax
    for message in file.message_type:
        found |= _message_facts(file.package, message)
    for extension in file.extension:
        found[f"extension {file.package}.{extension.name}"] = f"{extension.extendee} {_field(extension, ())}"
    for service in file.service:
        name = f"{file.package}.{service.name}"
        found[f"service {name}"] = _options(service.options)
        for method in service.method:
            sent = _flag("stream ", on=method.client_streaming) + method.input_type
            answered = _flag("stream ", on=method.server_streaming) + method.output_type
            found[f"rpc {name}.{method.name}"] = f"{sent} -> {answered} {_options(method.options)}".strip()
    return found


def _message_facts(scope: str, message: descriptor_pb2.DescriptorProto) -> Facts:
    name = f"{scope}.{message.name}"
    oneofs = [oneof.name for oneof in message.oneof_decl]
    found = {f"message {name}": _options(message.options), **dict(_enum_facts(name, message.enum_type))}
    for span in message.reserved_range:
        # The end of a message's range is exclusive, that of an enum's is not.
        found[f"reserved {name} {span.start}..{span.end - 1}"] = "reserved"
    for word in message.reserved_name:
        found[f"reserved {name} {word}"] = "reserved"
    for field in message.field:
        found[f"field {name}.{field.name}"] = _field(field, oneofs)
    for nested in message.nested_type:
        found |= _message_facts(name, nested)
    return found


def _enum_facts(scope: str, enums: Iterable[descriptor_pb2.EnumDescriptorProto]) -> Iterator[tuple[str, str]]:
    for enum in enums:
        name = f"{scope}.{enum.name}"
        yield f"enum {name}", _options(enum.options)
        for value in enum.value:
            yield f"value {name}.{value.name}", f"= {value.number} {_options(value.options)}"
        for span in enum.reserved_range:
            yield f"reserved {name} {span.start}..{span.end}", "reserved"
        for word in enum.reserved_name:
            yield f"reserved {name} {word}", "reserved"


def _field(field: descriptor_pb2.FieldDescriptorProto, oneofs: Iterable[str]) -> str:
    label = descriptor_pb2.FieldDescriptorProto.Label.Name(field.label).removeprefix("LABEL_").lower()
    kind = (
        field.type_name
        or descriptor_pb2.FieldDescriptorProto.Type.Name(field.type).removeprefix("TYPE_").lower()
    )
    oneof = f"oneof {list(oneofs)[field.oneof_index]}" if field.HasField("oneof_index") else ""
    presence = _flag("explicit presence", on=field.proto3_optional)
    words = (
        label,
        kind,
        f"= {field.number}",
        _own_json_name(field),
        oneof,
        presence,
        _options(field.options),
    )
    return " ".join(word for word in words if word)


def _own_json_name(field: descriptor_pb2.FieldDescriptorProto) -> str:
    """Return the JSON name if it is not the one that follows from the field's name."""
    head, *tail = field.name.split("_")
    usual = head + "".join(word.capitalize() for word in tail)
    return "" if field.json_name in {"", usual} else f"json {field.json_name}"


def _options(options: _Options) -> str:
    text = text_format.MessageToString(options, as_one_line=True, use_index_order=True)
    return f"[{text}]" if text else ""


def _flag(word: str, *, on: bool) -> str:
    return word if on else ""


def differences(ours: Mapping[str, str], official: Mapping[str, str]) -> list[str]:
    """Return one line for each element that is missing, superfluous or not the same; empty if none."""
    lines = []
    for name in sorted(ours.keys() | official.keys()):
        mine, theirs = ours.get(name), official.get(name)
        if mine is None:
            lines.append(f"missing: {name}: {theirs}")
        elif theirs is None:
            lines.append(f"not in CSI: {name}: {mine}")
        elif mine != theirs:
            lines.append(f"differs: {name}: ours `{mine}`, official `{theirs}`")
    return lines


def compat_differences(
    ours: Mapping[str, str], compat: Mapping[str, str], previous: Mapping[str, str]
) -> list[str]:
    """Return what a caller of the previous version would miss in csi.proto and csi_compat.proto together."""
    lines = []
    for name, theirs in sorted(previous.items()):
        if name in LOST_SINCE_PREVIOUS:
            kind = name.partition(" ")[0]
            mine = compat.get(f"{kind} csi.compat.v1.{LOST_SINCE_PREVIOUS[name]}")
            if mine is None or _wire(mine) != _wire(theirs):
                lines.append(f"lost: {name}: csi_compat.proto has `{mine}`, CSI before 1.13 `{theirs}`")
        elif name not in ours:
            lines.append(f"lost: {name}: `{theirs}` is in neither csi.proto nor csi_compat.proto")
        elif _wire(ours[name]) != _wire(theirs):
            lines.append(f"changed: {name}: ours `{ours[name]}`, CSI before 1.13 `{theirs}`")
    return lines + [
        f"not in CSI before 1.13: {name}" for name in sorted(LOST_SINCE_PREVIOUS.keys() - previous.keys())
    ]


def _wire(fact: str) -> str:
    """Reduce a fact to what decides the bytes: no options, oneofs or presence, types without package."""
    text = fact.partition("[")[0].partition(" oneof ")[0].replace(" explicit presence", "")
    return text.replace(".csi.compat.v1.", ".csi.v1.").strip()


async def official(modfile: str) -> descriptor_pb2.FileDescriptorProto:
    """Return the descriptor that the official module named in a mod file carries.

    Args:
        modfile: CURRENT or PREVIOUS.

    Raises:
        UnavailableError: no Go, a Go that is too old, or no way to get the module.
        CommandFailed: the program itself does not build or run.
    """
    go = ("go", "-C", str(DESCRIPTOR_DIR))
    try:
        await run((*go, "mod", "download", f"-modfile={modfile}"), timeout_s=TIMEOUT_S)
    except FailedPrecondition as error:
        raise UnavailableError("Go is not installed") from error
    except (CommandFailed, DeadlineExceeded) as error:
        raise UnavailableError(f"the official Go module cannot be had: {error}") from error
    output = await run((*go, "run", f"-modfile={modfile}", "."), timeout_s=TIMEOUT_S)
    return descriptor_pb2.FileDescriptorProto.FromString(base64.b64decode(output.stdout))


async def check() -> int:
    """Compare and print; return the exit status."""
    try:
        current, previous = facts(await official(CURRENT)), facts(await official(PREVIOUS))
    except UnavailableError as reason:
        print(f"skipped: {reason}")
        return 0
    ours = facts(descriptor_pb2.FileDescriptorProto.FromString(csi_pb2.DESCRIPTOR.serialized_pb))
    compat = facts(descriptor_pb2.FileDescriptorProto.FromString(csi_compat_pb2.DESCRIPTOR.serialized_pb))
    lines = differences(ours, current) + compat_differences(ours, compat, previous)
    for line in lines:
        print(line)
    print(f"{len(lines)} differences in {len(current)} elements of CSI 1.13 and {len(previous)} of CSI 1.12")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(asyncio.run(check()))
