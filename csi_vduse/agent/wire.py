"""agent.proto messages ↔ the agent's values, and errors ↔ gRPC status, for server and client alike.

An error travels as its gRPC code and message, and in trailing metadata as the name of its class and its hint,
so that the client raises what the agent raised.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

import grpc

from csi_vduse import errors
from csi_vduse.agent.model import Attachment, AttachSpec, OperationStats, RemoteStats, State, VolumeStats
from csi_vduse.dataplane.backend_spec import (
    BackendSpec,
    FileBackend,
    NbdBackend,
    NbdTls,
    NullBackend,
    VhostUserBackend,
)
from csi_vduse.dataplane.throttle import DEFAULT_BURST_S, Throttle
from csi_vduse.errors import InvalidArgument, VduseError
from csi_vduse.proto import agent_pb2
from csi_vduse.vdpa.model import Bus, BusDevice

ERROR_KEY = "csi-vduse-error-bin"
HINT_KEY = "csi-vduse-hint-bin"

Metadata = tuple[tuple[str, bytes], ...]

_BUS_TO_WIRE = {Bus.VIRTIO: agent_pb2.BUS_VIRTIO_VDPA, Bus.VHOST: agent_pb2.BUS_VHOST_VDPA}
_BUS_FROM_WIRE = {
    agent_pb2.BUS_UNSPECIFIED: Bus.VIRTIO,
    agent_pb2.BUS_VIRTIO_VDPA: Bus.VIRTIO,
    agent_pb2.BUS_VHOST_VDPA: Bus.VHOST,
}
_STATE_TO_WIRE = {
    State.ATTACHING: agent_pb2.STATE_ATTACHING,
    State.ATTACHED: agent_pb2.STATE_ATTACHED,
    State.DETACHING: agent_pb2.STATE_DETACHING,
    State.WORKER_DEAD: agent_pb2.STATE_WORKER_DEAD,
    State.BROKEN: agent_pb2.STATE_BROKEN,
    State.STALLED: agent_pb2.STATE_STALLED,
}
_STATE_FROM_WIRE = {wire: state for state, wire in _STATE_TO_WIRE.items()}


def backend_to_wire(backend: BackendSpec) -> agent_pb2.Backend:
    """Encode where the bytes are."""
    match backend:
        case FileBackend(path):
            return agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(path)))
        case NbdBackend(uri, tls, write_through, control):
            nbd = agent_pb2.NbdBackend(
                uri=uri, tls=_tls_to_wire(tls), write_through=write_through, control=control
            )
            return agent_pb2.Backend(nbd=nbd)
        case NullBackend():
            return agent_pb2.Backend(null=agent_pb2.NullBackend())
        case VhostUserBackend(socket, without_flush):
            vhost_user = agent_pb2.VhostUserBackend(socket=str(socket), without_flush=without_flush)
            return agent_pb2.Backend(vhost_user=vhost_user)


def backend_from_wire(message: agent_pb2.Backend) -> BackendSpec:
    """Decode where the bytes are.

    Raises:
        InvalidArgument: none given, a relative path, or a URI that is none.
    """
    match message.WhichOneof("kind"):
        case "file":
            path = Path(message.file.path)
            if not path.is_absolute():
                raise InvalidArgument(f"backend path {message.file.path!r} is not absolute")
            return FileBackend(path)
        case "nbd":
            tls = _tls_from_wire(message.nbd.tls) if message.nbd.HasField("tls") else None
            return NbdBackend(message.nbd.uri, tls, message.nbd.write_through, message.nbd.control)
        case "null":
            return NullBackend()
        case "vhost_user":
            socket = Path(message.vhost_user.socket)
            if not socket.is_absolute():
                raise InvalidArgument(f"vhost-user socket {message.vhost_user.socket!r} is not absolute")
            return VhostUserBackend(socket, message.vhost_user.without_flush)
    raise InvalidArgument("the request names no backend", hint="file, nbd, vhost_user or null")


def _tls_to_wire(tls: NbdTls | None) -> agent_pb2.NbdTls | None:
    if tls is None:
        return None
    return agent_pb2.NbdTls(
        certificates=str(tls.certificates or ""), psk_file=str(tls.psk_file or ""), hostname=tls.hostname
    )


def _tls_from_wire(message: agent_pb2.NbdTls) -> NbdTls:
    return NbdTls(
        Path(message.certificates) if message.certificates else None,
        Path(message.psk_file) if message.psk_file else None,
        message.hostname,
    )


def throttle_to_wire(throttle: Throttle) -> agent_pb2.Throttle:
    """Encode limits."""
    return agent_pb2.Throttle(iops=throttle.iops, bytes_per_s=throttle.bytes_per_s, burst_s=throttle.burst_s)


def throttle_from_wire(message: agent_pb2.Throttle) -> Throttle:
    """Decode limits.

    Raises:
        InvalidArgument: a value out of range.
    """
    return Throttle(message.iops, message.bytes_per_s, message.burst_s or DEFAULT_BURST_S)


def spec_to_wire(spec: AttachSpec) -> agent_pb2.AttachRequest:
    """Encode an attach request."""
    return agent_pb2.AttachRequest(
        volume_id=spec.volume_id,
        backend=backend_to_wire(spec.backend),
        capacity_bytes=spec.capacity_bytes,
        bus=_BUS_TO_WIRE[spec.bus],
        read_only=spec.read_only,
        queues=spec.queues,
        queue_size=spec.queue_size,
        block_size_bytes=spec.block_size_bytes,
        packed=spec.packed,
        is_network=spec.is_network,
        throttle=throttle_to_wire(spec.throttle),
    )


def spec_from_wire(message: agent_pb2.AttachRequest) -> AttachSpec:
    """Decode an attach request.

    Raises:
        InvalidArgument: a field has a value that can never work.
    """
    if message.bus not in _BUS_FROM_WIRE:
        raise InvalidArgument(f"unknown bus {message.bus}")
    return AttachSpec(
        volume_id=message.volume_id,
        backend=backend_from_wire(message.backend),
        capacity_bytes=message.capacity_bytes,
        bus=_BUS_FROM_WIRE[message.bus],
        read_only=message.read_only,
        queues=message.queues,
        queue_size=message.queue_size,
        block_size_bytes=message.block_size_bytes,
        packed=message.packed,
        is_network=message.is_network,
        throttle=throttle_from_wire(message.throttle),
    )


def attachment_to_wire(attachment: Attachment) -> agent_pb2.Attachment:
    """Encode an attachment."""
    spec, device = attachment.spec, attachment.device
    return agent_pb2.Attachment(
        volume_id=spec.volume_id,
        device_name=spec.device_name,
        bus=_BUS_TO_WIRE[spec.bus],
        path=str(device.path) if device else "",
        major=device.major if device else 0,
        minor=device.minor if device else 0,
        state=_STATE_TO_WIRE[attachment.state],
        state_reason=attachment.state_reason,
        backend=backend_to_wire(spec.backend),
        capacity_bytes=spec.capacity_bytes,
        read_only=spec.read_only,
        queues=spec.queues,
        queue_size=spec.queue_size,
        block_size_bytes=spec.block_size_bytes,
        packed=spec.packed,
        is_network=spec.is_network,
        throttle=throttle_to_wire(spec.throttle),
        worker_pid=attachment.worker_pid,
        worker_version=attachment.worker_version,
        serial=spec.disk_serial,
    )


def attachment_from_wire(message: agent_pb2.Attachment) -> Attachment:
    """Decode an attachment."""
    return Attachment(
        spec=AttachSpec(
            volume_id=message.volume_id,
            backend=backend_from_wire(message.backend),
            capacity_bytes=message.capacity_bytes,
            bus=_BUS_FROM_WIRE[message.bus],
            read_only=message.read_only,
            queues=message.queues,
            queue_size=message.queue_size,
            block_size_bytes=message.block_size_bytes,
            packed=message.packed,
            is_network=message.is_network,
            throttle=throttle_from_wire(message.throttle),
            serial=message.serial or message.volume_id,  # as agents did that do not say
        ),
        state=_STATE_FROM_WIRE.get(message.state, State.WORKER_DEAD),  # a later release may have more of them
        state_reason=message.state_reason,
        device=BusDevice(Path(message.path), message.major, message.minor) if message.path else None,
        worker_pid=message.worker_pid,
        worker_version=message.worker_version,
    )


def stats_to_wire(stats: VolumeStats) -> agent_pb2.VolumeStats:
    """Encode the counters of a worker."""
    return agent_pb2.VolumeStats(
        volume_id=stats.volume_id,
        backend=stats.backend,
        operations=[
            agent_pb2.OperationStats(
                operation=operation.operation,
                count=operation.count,
                bytes=operation.bytes,
                errors=operation.errors,
                latency_sum_s=operation.latency_sum_s,
                latency_max_s=operation.latency_max_s,
                latency=operation.latency,
            )
            for operation in stats.operations
        ],
        in_flight=stats.in_flight,
        kicks=stats.kicks,
        interrupts=stats.interrupts,
        batches=stats.batches,
        malformed=stats.malformed,
        batch_sizes=stats.batch_sizes,
        depths=stats.depths,
        data_max_bytes=stats.data_max_bytes,
        bounce_bytes=stats.bounce_bytes,
        throttled=stats.throttled,
        throttled_s=stats.throttled_s,
        waiting=stats.waiting,
        unanswered_s=stats.unanswered_s,
        stalled_s=stats.stalled_s,
        remote=agent_pb2.RemoteStats(**asdict(stats.remote)) if stats.remote else None,
    )


def stats_from_wire(message: agent_pb2.VolumeStats) -> VolumeStats:
    """Decode the counters of a worker."""
    return VolumeStats(
        volume_id=message.volume_id,
        backend=message.backend,
        operations=tuple(
            OperationStats(
                operation=operation.operation,
                count=operation.count,
                bytes=operation.bytes,
                errors=operation.errors,
                latency_sum_s=operation.latency_sum_s,
                latency_max_s=operation.latency_max_s,
                latency=tuple(operation.latency),
            )
            for operation in message.operations
        ),
        in_flight=message.in_flight,
        kicks=message.kicks,
        interrupts=message.interrupts,
        batches=message.batches,
        malformed=message.malformed,
        batch_sizes=tuple(message.batch_sizes),
        depths=tuple(message.depths),
        data_max_bytes=message.data_max_bytes,
        bounce_bytes=message.bounce_bytes,
        throttled=message.throttled,
        throttled_s=message.throttled_s,
        waiting=message.waiting,
        unanswered_s=message.unanswered_s,
        stalled_s=message.stalled_s,
        remote=_remote_from_wire(message.remote) if message.HasField("remote") else None,
    )


def _remote_from_wire(message: agent_pb2.RemoteStats) -> RemoteStats:
    values = {field.name: getattr(message, field.name) for field in fields(RemoteStats)}
    return RemoteStats(**{**values, "latency": tuple(message.latency)})


def error_status(error: VduseError) -> tuple[grpc.StatusCode, str, Metadata]:
    """Return code, message and trailing metadata for an error."""
    code = grpc.StatusCode[error.grpc_code]
    metadata = ((ERROR_KEY, type(error).__name__.encode()), (HINT_KEY, error.hint.encode()))
    return code, error.message, metadata


def error_from_rpc(error: grpc.aio.AioRpcError) -> VduseError:
    """Return what the agent raised; by its class if it says so, else by the code."""
    metadata: dict[str, str | bytes] = dict(error.trailing_metadata() or ())
    name, hint = _text(metadata.get(ERROR_KEY)), _text(metadata.get(HINT_KEY))
    message = error.details() or error.code().name
    kind = getattr(errors, name, None) if name else None
    if not (isinstance(kind, type) and issubclass(kind, VduseError) and _is_plain(kind)):
        kind = _class_of(error.code())
    return kind(message, hint=hint)


def _class_of(code: grpc.StatusCode) -> type[VduseError]:
    for kind in VduseError.__subclasses__():
        if kind.grpc_code == code.name and _is_plain(kind):
            return kind
    return VduseError


def _is_plain(kind: type[VduseError]) -> bool:
    """Whether it is made of a message and a hint, as all but CommandFailed are."""
    return kind.__init__ is VduseError.__init__


def _text(value: str | bytes | None) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else value or ""
