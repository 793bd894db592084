"""Values of the agent: what an attachment is, how it is asked for, and its record on disk.

A record is written before the agent acts and removed after the last trace is gone, so after a crash every
device, worker and file of ours is named by a record.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from csi_vduse.dataplane import backend_spec, throttle
from csi_vduse.dataplane.backend_spec import BackendSpec, ErrorBackend, NbdBackend, VhostUserBackend
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.dataplane.vhost_user.net_offer import QUEUES as CARD_QUEUES
from csi_vduse.errors import DataLoss, InvalidArgument
from csi_vduse.vdpa.model import Bus, BusDevice

__all__ = [
    "AttachSpec",
    "Attachment",
    "Bus",
    "BusDevice",
    "Handover",
    "Inspection",
    "OperationStats",
    "Probe",
    "RemoteStats",
    "State",
    "VolumeStats",
    "count_states",
    "device_name",
    "disk_serial",
]

DEFAULT_QUEUE_SIZE = 256
DEFAULT_BLOCK_SIZE_BYTES = 512
SECTOR_BYTES = 512
_MAX_VOLUME_ID_BYTES = 128  # CSI's limit for a volume id in a field
_FAITHFUL_SERIAL = re.compile(r"[ -~]{1,20}")
_PLAIN_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,30}")


class State(StrEnum):
    """Where an attachment is in its life."""

    ATTACHING = "attaching"
    ATTACHED = "attached"
    DETACHING = "detaching"
    WORKER_DEAD = "worker_dead"  # I/O waits; another one is being started
    STALLED = "stalled"  # the same, and starting one has not helped for long, or cannot help
    BROKEN = "broken"


# Recorded by an operation that may have ended before it was done.
HALF_WAY = frozenset({State.ATTACHING, State.DETACHING})


def count_states(states: Iterable[State]) -> dict[str, int]:
    """How many attachments are in each state; those without any too, for whoever watches them."""
    found = Counter(states)
    return {state.value: found[state] for state in State}


def device_name(volume_id: str) -> str:
    """Return the VDUSE device name of a volume: the id if it is a safe name, else a digest of it.

    Names share a directory with the device `control` and end up in paths and in 31-byte virtqueue names.
    """
    if _PLAIN_NAME.fullmatch(volume_id) and volume_id != "control":
        return volume_id
    return _digest(volume_id)


def disk_serial(volume_id: str) -> str:
    """Return the serial number of a volume's disk: the id if that comes through a virtio-blk serial unchanged.

    A serial has 20 bytes (VIRTIO 1.3, 5.2.6, GET_ID). An id that is longer, or has more in it than printable ASCII, is
    digested: cut, it would be another volume's too, or other characters at the other end.
    """
    return volume_id if _FAITHFUL_SERIAL.fullmatch(volume_id) else _digest(volume_id)


def _digest(volume_id: str) -> str:
    return "vol-" + hashlib.sha256(volume_id.encode(errors="surrogatepass")).hexdigest()[:16]


@dataclass(frozen=True)
class AttachSpec:
    """What is asked of an attachment; two specs that are equal ask for the same one.

    Args:
        volume_id: whose device it is.
        backend: where the bytes are.
        capacity_bytes: a multiple of the block size.
        bus: which bus driver gets the device.
        read_only: the device refuses writes.
        queues: 0 means the agent's default.
        queue_size: 0 means the agent's default.
        block_size_bytes: 0 means 512.
        packed: offer packed virtqueues; drivers that cannot use them take split ones.
        throttle: how fast it may be; changes by `Agent.throttle`.
        is_network: a network card and no disk; of a vhost-user backend, with a capacity of 0.
        serial: of a disk that was attached before; empty: see disk_serial. Not asked for, so not compared.
    """

    volume_id: str
    backend: BackendSpec
    capacity_bytes: int
    bus: Bus = Bus.VIRTIO
    read_only: bool = False
    queues: int = 0
    queue_size: int = 0
    block_size_bytes: int = 0
    packed: bool = False
    throttle: Throttle = UNLIMITED
    is_network: bool = False
    serial: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuse what can never be an attachment; device geometry is checked by DeviceSpec."""
        if (
            not self.volume_id
            or len(self.volume_id.encode()) > _MAX_VOLUME_ID_BYTES
            or "\0" in self.volume_id
        ):
            raise InvalidArgument(f"volume id {self.volume_id[:40]!r} is empty or longer than 128 bytes")
        if self.is_network and (
            not isinstance(self.backend, VhostUserBackend) or self.bus is not Bus.VIRTIO or self.packed
        ):
            raise InvalidArgument(
                "a network card is made of a vhost-user server, on the bus virtio_vdpa, with split queues"
            )

    @property
    def device_name(self) -> str:
        """Name of the VDUSE device."""
        return device_name(self.volume_id)

    @property
    def disk_serial(self) -> str:
        """What the disk answers to GET_ID, of which it gives 20 bytes."""
        return self.serial or disk_serial(self.volume_id)

    def with_defaults(self, *, queues: int) -> AttachSpec:
        """Return the spec with its zeros replaced; `queues` is this node's default."""
        return replace(
            self,
            queues=CARD_QUEUES if self.is_network else self.queues or queues,
            queue_size=self.queue_size or DEFAULT_QUEUE_SIZE,
            block_size_bytes=self.block_size_bytes or DEFAULT_BLOCK_SIZE_BYTES,
        )


@dataclass(frozen=True)
class Attachment:
    """A volume on this node.

    Args:
        spec: what was asked for, zeros replaced.
        state: see State.
        state_reason: why, when the state is not the normal one.
        device: what users open; None until bound.
        worker_pid: 0 for none.
        worker_version: release of the worker's program, empty if unknown; not of the record.
        forced: it is being detached by force: what waits for it fails.
        renewed: what it is served from, if its server has given another export than was asked for; see renewal.py.
    """

    spec: AttachSpec
    state: State
    state_reason: str = ""
    device: BusDevice | None = None
    worker_pid: int = 0
    worker_version: str = ""
    forced: bool = False
    renewed: NbdBackend | None = None

    @property
    def backend(self) -> BackendSpec:
        """What it is served from."""
        return self.renewed or self.spec.backend

    @property
    def volume_id(self) -> str:
        """The volume's id."""
        return self.spec.volume_id

    @property
    def device_name(self) -> str:
        """Name of the VDUSE device."""
        return self.spec.device_name

    @property
    def path(self) -> Path | None:
        """What users open: /dev/vdX or /dev/vhost-vdpa-N."""
        return self.device.path if self.device else None


@dataclass(frozen=True)
class OperationStats:
    """Counters of one kind of request; csi_vduse/histogram.py reads the latencies."""

    operation: str
    count: int
    bytes: int
    errors: int
    latency_sum_s: float
    latency_max_s: float
    latency: tuple[int, ...]


@dataclass(frozen=True)
class RemoteStats:
    """Of a backend behind a network; agent.proto says what each is."""

    state: str
    reason: str = ""
    connected: int = 0
    connects: int = 0
    failures: int = 0
    losses: int = 0
    resent: int = 0
    commands: int = 0
    sends: int = 0
    receives: int = 0
    received_bytes: int = 0
    copied_bytes: int = 0
    latency_sum_s: float = 0
    latency_max_s: float = 0
    latency: tuple[int, ...] = ()


@dataclass(frozen=True)
class VolumeStats:
    """Counters of one worker since it started; agent.proto says what each is."""

    volume_id: str
    backend: str
    operations: tuple[OperationStats, ...]
    in_flight: int
    kicks: int
    interrupts: int
    batches: int
    malformed: int
    batch_sizes: tuple[int, ...] = ()
    depths: tuple[int, ...] = ()
    data_max_bytes: int = 0
    bounce_bytes: int = 0
    throttled: int = 0
    throttled_s: float = 0
    waiting: int = 0
    unanswered_s: float = 0
    stalled_s: float = 0
    remote: RemoteStats | None = None


@dataclass(frozen=True)
class Inspection:
    """An attachment with its counters and what the driver negotiated; stats is None without a worker."""

    attachment: Attachment
    stats: VolumeStats | None
    features: int
    device_status: int


@dataclass(frozen=True)
class Handover:
    """A volume that has another worker now; pause_s: how long none served it."""

    attachment: Attachment
    pause_s: float


@dataclass(frozen=True)
class Probe:
    """Whether the agent can work, and what keeps it from that."""

    version: str
    ready: bool
    problems: tuple[str, ...]
    max_volumes: int


def attachment_to_json(attachment: Attachment) -> dict[str, Any]:
    """Encode an attachment for its record."""
    spec, device = attachment.spec, attachment.device
    return {
        "volume_id": spec.volume_id,
        # What is served stands where earlier releases look: a volume that goes back to one of them is handed over.
        "backend": backend_spec.to_json(attachment.backend),
        "asked_backend": backend_spec.to_json(spec.backend),
        "capacity_bytes": spec.capacity_bytes,
        "bus": spec.bus.value,
        "read_only": spec.read_only,
        "queues": spec.queues,
        "queue_size": spec.queue_size,
        "block_size_bytes": spec.block_size_bytes,
        "packed": spec.packed,
        "is_network": spec.is_network,
        "throttle": throttle.to_json(spec.throttle),
        "serial": spec.disk_serial,
        "state": attachment.state.value,
        "state_reason": attachment.state_reason,
        "worker_pid": attachment.worker_pid,
        "forced": attachment.forced,
        "device": {"path": str(device.path), "major": device.major, "minor": device.minor}
        if device
        else None,
    }


def attachment_from_json(value: dict[str, Any]) -> Attachment:
    """Decode what `attachment_to_json` made.

    Raises:
        DataLoss: a field is missing or of the wrong kind.
    """
    try:
        device, served = value["device"], _backend_from_json(value["backend"])
        asked = _backend_from_json(value.get("asked_backend", value["backend"]))
        return Attachment(
            spec=AttachSpec(
                volume_id=value["volume_id"],
                backend=asked,
                capacity_bytes=value["capacity_bytes"],
                bus=Bus(value["bus"]),
                read_only=value["read_only"],
                queues=value["queues"],
                queue_size=value["queue_size"],
                block_size_bytes=value["block_size_bytes"],
                packed=value.get("packed", False),
                is_network=value.get("is_network", False),
                throttle=throttle.from_json(value.get("throttle")),
                serial=value.get("serial", value["volume_id"]),  # as releases did that wrote none
            ),
            state=State(value["state"]),
            state_reason=value["state_reason"],
            device=BusDevice(Path(device["path"]), device["major"], device["minor"]) if device else None,
            worker_pid=value["worker_pid"],
            forced=value.get("forced", False),
            renewed=served if isinstance(served, NbdBackend) and served != asked else None,
        )
    except (KeyError, TypeError, ValueError, InvalidArgument) as error:
        raise DataLoss(f"attachment record is damaged: {error}") from error


def _backend_from_json(value: dict[str, Any]) -> BackendSpec:
    backend = backend_spec.from_json(value)
    if isinstance(backend, ErrorBackend):
        raise InvalidArgument("no attachment has the backend that fails everything")
    return backend


def stats_from_json(volume_id: str, backend: str, value: dict[str, Any], *, bounce_bytes: int) -> VolumeStats:
    """Decode a worker's answer to "stats"; what an older worker does not count is zero."""
    return VolumeStats(
        volume_id=volume_id,
        backend=backend,
        operations=tuple(
            OperationStats(
                operation=str(operation["operation"]),
                count=int(operation["count"]),
                bytes=int(operation["bytes"]),
                errors=int(operation["errors"]),
                latency_sum_s=float(operation["latency_sum_s"]),
                latency_max_s=float(operation.get("latency_max_s", 0)),
                latency=tuple(int(bucket) for bucket in operation.get("latency", ())),
            )
            for operation in value.get("operations", ())
        ),
        in_flight=int(value.get("in_flight", 0)),
        kicks=int(value.get("kicks", 0)),
        interrupts=int(value.get("interrupts", 0)),
        batches=int(value.get("batches", 0)),
        malformed=int(value.get("malformed", 0)),
        batch_sizes=tuple(int(bucket) for bucket in value.get("batch_sizes", ())),
        depths=tuple(int(bucket) for bucket in value.get("depths", ())),
        data_max_bytes=int(value.get("data_max_bytes", 0)),
        bounce_bytes=bounce_bytes,
        throttled=int(value.get("throttled", 0)),
        throttled_s=float(value.get("throttled_s", 0)),
        waiting=int(value.get("requests_waiting", 0)),
        unanswered_s=float(value.get("unanswered_s", 0)),
        stalled_s=float(value.get("stalled_s", 0)),
        remote=_remote_from_json(value["remote"]) if "remote" in value else None,
    )


def _remote_from_json(value: dict[str, Any]) -> RemoteStats:
    known = {field.name: value[field.name] for field in fields(RemoteStats) if field.name in value}
    return RemoteStats(**{**known, "latency": tuple(known.get("latency", ()))})
