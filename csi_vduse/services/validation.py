"""Requests checked once, at the edge: protobuf in, value objects out. Pure.

After this module types are trusted. Messages name the field or parameter and what is allowed. Limits on texts
are CSI's (spec.md, "Size Limits": 128 bytes for a string unless said otherwise).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from csi_vduse.errors import InvalidArgument
from csi_vduse.proto import csi_pb2
from csi_vduse.volumes import parameters as storage_class
from csi_vduse.volumes.model import Source, SourceKind
from csi_vduse.volumes.parameters import AskedParameters
from csi_vduse.volumes.policy import DEFAULT_FILESYSTEM, AccessMode, Use
from csi_vduse.volumes.sizes import CapacityRange
from csi_vduse.volumes.topology import TopologyRequirement

MAX_TEXT_BYTES = 128
MAX_NODE_ID_BYTES = 256
_SNAPSHOT_PREFIX = "csi.storage.k8s.io/"


@dataclass(frozen=True)
class CreateVolume:
    """A valid CreateVolume request."""

    name: str
    wanted: CapacityRange
    uses: tuple[Use, ...]
    asked: AskedParameters
    source: Source | None
    requirement: TopologyRequirement | None


@dataclass(frozen=True)
class ExpandVolume:
    """A valid ControllerExpandVolume request; use is None if the caller did not say."""

    volume_id: str
    wanted: CapacityRange
    use: Use | None


@dataclass(frozen=True)
class CreateSnapshot:
    """A valid CreateSnapshot request."""

    name: str
    source_volume_id: str
    requirement: TopologyRequirement | None


@dataclass(frozen=True)
class ValidateCapabilities:
    """A valid ValidateVolumeCapabilities request; asked is None if no parameters were given."""

    volume_id: str
    uses: tuple[Use, ...]
    context: Mapping[str, str]
    asked: AskedParameters | None


@dataclass(frozen=True)
class GetCapacity:
    """A valid GetCapacity request."""

    uses: tuple[Use, ...]
    asked: AskedParameters
    place: Mapping[str, str]


@dataclass(frozen=True)
class PublishVolume:
    """A valid ControllerPublishVolume request."""

    volume_id: str
    node_id: str
    use: Use
    read_only: bool
    context: Mapping[str, str]


def publish_volume(request: csi_pb2.ControllerPublishVolumeRequest) -> PublishVolume:
    """Check a ControllerPublishVolume request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    return PublishVolume(
        volume_id=object_id(request.volume_id, "volume_id"),
        node_id=node_id(request.node_id),
        use=use(request.volume_capability),
        read_only=request.readonly,
        context=dict(request.volume_context),
    )


def create_volume(request: csi_pb2.CreateVolumeRequest) -> CreateVolume:
    """Check a CreateVolume request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    storage_class.parse_mutable(request.mutable_parameters)
    return CreateVolume(
        name=_name(request.name),
        wanted=capacity_range(request.capacity_range)
        if request.HasField("capacity_range")
        else CapacityRange(),
        uses=uses(request.volume_capabilities),
        # Mutable parameters go before those of the StorageClass (CSI, CreateVolumeRequest).
        asked=storage_class.parse({**request.parameters, **request.mutable_parameters}),
        source=_source(request.volume_content_source) if request.HasField("volume_content_source") else None,
        requirement=_requirement(request.accessibility_requirements)
        if request.HasField("accessibility_requirements")
        else None,
    )


def expand_volume(request: csi_pb2.ControllerExpandVolumeRequest) -> ExpandVolume:
    """Check a ControllerExpandVolume request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    if not request.HasField("capacity_range"):
        raise InvalidArgument("capacity_range is missing")
    return ExpandVolume(
        volume_id=object_id(request.volume_id, "volume_id"),
        wanted=capacity_range(request.capacity_range),
        use=use(request.volume_capability) if request.HasField("volume_capability") else None,
    )


def create_snapshot(request: csi_pb2.CreateSnapshotRequest) -> CreateSnapshot:
    """Check a CreateSnapshot request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    for key in request.parameters:
        if not key.startswith(_SNAPSHOT_PREFIX):
            raise InvalidArgument(f"unknown parameter {key!r}; snapshots have no parameters")
    return CreateSnapshot(
        name=_name(request.name),
        source_volume_id=object_id(request.source_volume_id, "source_volume_id"),
        requirement=_requirement(request.accessibility_requirements)
        if request.HasField("accessibility_requirements")
        else None,
    )


def validate_capabilities(request: csi_pb2.ValidateVolumeCapabilitiesRequest) -> ValidateCapabilities:
    """Check a ValidateVolumeCapabilities request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    return ValidateCapabilities(
        volume_id=object_id(request.volume_id, "volume_id"),
        uses=uses(request.volume_capabilities),
        context=dict(request.volume_context),
        asked=storage_class.parse(request.parameters) if request.parameters else None,
    )


def get_capacity(request: csi_pb2.GetCapacityRequest) -> GetCapacity:
    """Check a GetCapacity request.

    Raises:
        InvalidArgument: what is wrong with which field.
    """
    return GetCapacity(
        uses=tuple(use(capability) for capability in request.volume_capabilities),
        asked=storage_class.parse(request.parameters),
        place=dict(request.accessible_topology.segments),
    )


def object_id(text: str, field: str) -> str:
    """Return an id that a caller gave; it need not have our form, unknown is another error.

    Raises:
        InvalidArgument: empty or longer than CSI allows.
    """
    if not text:
        raise InvalidArgument(f"{field} is missing")
    if len(text.encode()) > MAX_TEXT_BYTES:
        raise InvalidArgument(f"{field} has {len(text.encode())} bytes; allowed: {MAX_TEXT_BYTES}")
    return text


def node_id(text: str) -> str:
    """Return the id of a node; CSI allows 256 bytes for it (NodeGetInfoResponse).

    Raises:
        InvalidArgument: empty or longer.
    """
    if not text:
        raise InvalidArgument("node_id is missing")
    if len(text.encode()) > MAX_NODE_ID_BYTES:
        raise InvalidArgument(f"node_id has {len(text.encode())} bytes; allowed: {MAX_NODE_ID_BYTES}")
    return text


def max_entries(value: int) -> int:
    """Return the page length of a list request; 0 is no limit.

    Raises:
        InvalidArgument: negative.
    """
    if value < 0:
        raise InvalidArgument(f"max_entries is {value}; allowed: 0 (no limit) or more")
    return value


def uses(capabilities: Iterable[csi_pb2.VolumeCapability]) -> tuple[Use, ...]:
    """Check the capabilities of a request that must have some.

    Raises:
        InvalidArgument: there is none, or one is incomplete.
    """
    found = tuple(use(capability) for capability in capabilities)
    if not found:
        raise InvalidArgument("volume_capabilities is missing")
    return found


def use(capability: csi_pb2.VolumeCapability) -> Use:
    """Check one capability.

    Raises:
        InvalidArgument: access type or access mode is missing or unknown.
    """
    kind = capability.WhichOneof("access_type")
    if kind is None:
        raise InvalidArgument("volume_capability has no access_type; allowed: block, mount")
    try:
        mode = AccessMode(capability.access_mode.mode)
    except ValueError:
        names = ", ".join(mode.name for mode in AccessMode)
        raise InvalidArgument(
            f"access_mode {capability.access_mode.mode} is missing or unknown; allowed: {names}"
        ) from None
    if kind == "block":
        return Use(mode, filesystem=None)
    mount = capability.mount
    return Use(mode, mount.fs_type or DEFAULT_FILESYSTEM, tuple(mount.mount_flags))


def capacity_range(wanted: csi_pb2.CapacityRange) -> CapacityRange:
    """Check a capacity range that the caller sent.

    Raises:
        InvalidArgument: negative, the limit below the requirement, or no end set at all.
    """
    required_bytes, limit_bytes = wanted.required_bytes, wanted.limit_bytes
    if required_bytes < 0 or limit_bytes < 0:
        raise InvalidArgument(
            f"capacity_range is negative: required_bytes {required_bytes}, limit_bytes {limit_bytes}"
        )
    if required_bytes == 0 and limit_bytes == 0:
        raise InvalidArgument(
            "capacity_range has neither required_bytes nor limit_bytes", hint="ask for 1 byte or more"
        )
    if limit_bytes and limit_bytes < required_bytes:
        raise InvalidArgument(f"limit_bytes {limit_bytes} is less than required_bytes {required_bytes}")
    return CapacityRange(required_bytes, limit_bytes)


def _name(name: str) -> str:
    if not name:
        raise InvalidArgument("name is missing")
    if len(name.encode()) > MAX_TEXT_BYTES:
        raise InvalidArgument(f"name has {len(name.encode())} bytes; allowed: {MAX_TEXT_BYTES}")
    if "/" in name or ".." in name or name == ".":
        raise InvalidArgument(f"name {name!r} looks like a path; allowed: no '/' and no '..'")
    # CSI: any Unicode character but the control characters, U+0000-0008, 000B, 000C, 000E-001F, 007F-009F.
    if any(ord(char) < 0x20 or 0x7F <= ord(char) <= 0x9F for char in name):
        raise InvalidArgument(f"name {name!r} has control characters")
    return name


def _source(source: csi_pb2.VolumeContentSource) -> Source:
    match source.WhichOneof("type"):
        case "snapshot":
            return Source(SourceKind.SNAPSHOT, object_id(source.snapshot.snapshot_id, "snapshot_id"))
        case "volume":
            return Source(SourceKind.VOLUME, object_id(source.volume.volume_id, "source volume_id"))
    raise InvalidArgument("volume_content_source is empty; allowed: snapshot, volume")


def _requirement(requirement: csi_pb2.TopologyRequirement) -> TopologyRequirement:
    return TopologyRequirement(
        requisite=tuple(dict(term.segments) for term in requirement.requisite),
        preferred=tuple(dict(term.segments) for term in requirement.preferred),
    )
