"""What a vhost-user server offers, and what of it a device can show: pure functions of what the server said.

The server works on the driver's rings by itself, so what the driver negotiates is the server's: features and
configuration space are shown as they are, but for what cannot be carried.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import ClassVar, Final

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.dataplane.vhost_user.protocol import ProtocolFeature
from csi_vduse.errors import FailedPrecondition, ProtocolError

CONFIG_BYTES: Final = 60  # of struct virtio_blk_config up to write_zeroes_may_unmap and its padding

F_SIZE_MAX: Final = 1 << 1
F_GEOMETRY: Final = 1 << 4
# What a driver may have of a server's features. Not CONFIG_WCE, which VDUSE refuses; not packed rings: where a lost
# server is to go on is read from the used ring of a split one.
_CARRIED: Final = (
    F_SIZE_MAX
    | config_space.F_SEG_MAX
    | F_GEOMETRY
    | config_space.F_RO
    | config_space.F_BLK_SIZE
    | config_space.F_FLUSH
    | config_space.F_TOPOLOGY
    | config_space.F_MQ
    | config_space.F_DISCARD
    | config_space.F_WRITE_ZEROES
    | config_space.F_INDIRECT_DESC
    | config_space.F_EVENT_IDX
    | config_space.F_VERSION_1
)
_OF_DISK: Final = _CARRIED & ~(
    config_space.F_MQ | config_space.F_INDIRECT_DESC | config_space.F_EVENT_IDX | config_space.F_VERSION_1
)
# What devices need, and what a server without it does not do.
_NEEDED: Final = {
    ProtocolFeature.REPLY_ACK: "does not acknowledge requests (REPLY_ACK)",
    ProtocolFeature.CONFIG: "does not show its configuration space (CONFIG): it is no vhost-user-blk server",
    ProtocolFeature.INFLIGHT_SHMFD: "keeps no log of what is in flight (INFLIGHT_SHMFD): killed, it would lose requests",
}
_CAPACITY_AND_BLOCK: Final = struct.Struct("<QIIHBBI")
_QUEUES_AT: Final = 34
_SEG_MAX: Final = struct.Struct("<I")
_SEG_MAX_AT: Final = 12


@dataclass(frozen=True)
class Offer:
    """What the server of a disk said of itself; net_offer.py has that of a network card.

    Args:
        features: virtio feature bits.
        protocol_features: of the protocol.
        queue_count: what it answered to GET_QUEUE_NUM.
        config: the first CONFIG_BYTES of the configuration space.
    """

    features: int
    protocol_features: ProtocolFeature
    queue_count: int
    config: bytes

    wanted: ClassVar = (
        ProtocolFeature.MQ
        | ProtocolFeature.REPLY_ACK
        | ProtocolFeature.BACKEND_REQ
        | ProtocolFeature.CONFIG
        | ProtocolFeature.INFLIGHT_SHMFD
    )
    """What of the protocol we use where it is offered."""
    shows_config: ClassVar = True

    @property
    def queues(self) -> int:
        """How many a device may have: SPDK says one number for all its devices, and another for this one."""
        if not self.features & config_space.F_MQ:
            return min(1, self.queue_count)
        return min(self.queue_count, int.from_bytes(self.config[_QUEUES_AT : _QUEUES_AT + 2], "little"))

    @property
    def is_read_only(self) -> bool:
        """Whether it lets nobody write."""
        return bool(self.features & config_space.F_RO)

    @property
    def keeps_log(self) -> bool:
        """Whether it notes what is in flight, for a server that comes after it."""
        return bool(self.protocol_features & ProtocolFeature.INFLIGHT_SHMFD)

    @property
    def tells_changes(self) -> bool:
        """Whether it says when its configuration space is another one, on a channel for that."""
        return bool(self.protocol_features & ProtocolFeature.BACKEND_REQ)

    @property
    def capacity_bytes(self) -> int:
        """Size of the disk."""
        return self.capacity_in(self.config)

    @staticmethod
    def capacity_in(config: bytes) -> int:
        """Size of the disk that a configuration space shows."""
        return int(_CAPACITY_AND_BLOCK.unpack_from(config)[0]) * config_space.SECTOR_BYTES

    @property
    def block_size_bytes(self) -> int:
        """Its logical blocks."""
        if not self.features & config_space.F_BLK_SIZE:
            return config_space.SECTOR_BYTES
        return int(_CAPACITY_AND_BLOCK.unpack_from(self.config)[-1])

    def check_language(self, needed: ProtocolFeature) -> None:
        """Refuse a server that does not speak these parts of the protocol, and virtio 1: FailedPrecondition."""
        for feature, what in _NEEDED.items():
            if needed & feature and not self.protocol_features & feature:
                raise FailedPrecondition(f"the vhost-user server {what}")
        if not self.features & config_space.F_VERSION_1:
            raise FailedPrecondition("the vhost-user server does not speak virtio 1")

    def check(self, *, read_only: bool, without_flush: bool, keeps_log: bool) -> None:
        """Refuse a server that cannot serve a volume of ours; keeps_log: it works on the driver's rings by itself.

        Raises:
            FailedPrecondition: it lacks what is needed.
            ProtocolError: what it says cannot be.
        """
        needed = ProtocolFeature.REPLY_ACK | ProtocolFeature.CONFIG
        self.check_language(needed | ProtocolFeature.INFLIGHT_SHMFD if keeps_log else needed)
        if not self.features & config_space.F_FLUSH and not without_flush:
            raise FailedPrecondition(
                "the vhost-user server cannot flush: what was written may be lost with it",
                hint="use a disk of it that can; or one that writes through, and say so: vhost-user:SOCKET,without-flush",
            )
        if read_only and keeps_log and not self.is_read_only:
            raise FailedPrecondition(
                "the vhost-user server lets the disk be written",
                hint="make it read-only there: nobody else looks at the driver's requests",
            )
        if self.block_size_bytes not in config_space.BLOCK_SIZES:
            raise ProtocolError(f"the vhost-user server has blocks of {self.block_size_bytes} bytes")
        if not self.capacity_bytes or self.capacity_bytes % self.block_size_bytes:
            raise ProtocolError(
                f"the vhost-user server has a disk of {self.capacity_bytes} bytes",
                hint="its storage may have been removed",
            )
        if self.queues < 1:
            raise ProtocolError("the vhost-user server has no queues")

    def device_features(self, queues: int) -> int:
        """Feature bits that a device with so many queues offers its driver."""
        bits = self.features & _CARRIED | config_space.F_ACCESS_PLATFORM
        return bits if queues > 1 else bits & ~config_space.F_MQ

    @staticmethod
    def server_features(negotiated: int) -> int:
        """Feature bits to set at a server for a driver: it has no IOMMU to ask, and the protocol has features."""
        return negotiated & ~config_space.F_ACCESS_PLATFORM | protocol.F_PROTOCOL_FEATURES

    def mediated_features(self, queues: int, *, read_only: bool, packed: bool) -> int:
        """Feature bits that a device offers whose rings are the engine's: the disk's are the server's."""
        ours = config_space.features(queues=queues, read_only=False, discard=False, packed=packed)
        bits = ours & ~_OF_DISK | self.features & _OF_DISK | config_space.F_SEG_MAX
        writing = config_space.F_DISCARD | config_space.F_WRITE_ZEROES
        return bits & ~writing | config_space.F_RO if read_only else bits

    def device_config(self, queues: int, capacity_bytes: int, *, pieces: int | None = None) -> bytes:
        """Configuration space of such a device; pieces: of a request at most, where the engine says so too."""
        at, capacity = config_space.encode_capacity(capacity_bytes)
        shown = bytearray(self.config)
        shown[at : at + len(capacity)] = capacity
        struct.pack_into("<H", shown, _QUEUES_AT, queues)
        if pieces is not None:
            (theirs,) = _SEG_MAX.unpack_from(shown, _SEG_MAX_AT)
            limit = theirs if self.features & config_space.F_SEG_MAX and theirs else pieces
            _SEG_MAX.pack_into(shown, _SEG_MAX_AT, min(limit, pieces))
        return bytes(shown)
