"""What a vhost-user-net server offers (DPDK, OVS), and the network card that a device shows of it.

The configuration space is ours: such servers show none. A card has one pair of queues: to use more, a driver needs the
control queue, which VDUSE forbids (features_is_valid in drivers/vdpa/vdpa_user/vduse_dev.c).

A server keeps no log: it returns buffers in the order in which it took them, so that the next one begins where the used
ring ends; what was in its hands may be lost or come twice, as on any network.
"""

from __future__ import annotations

import hashlib
import struct
from typing import ClassVar, Final

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.dataplane.vhost_user.protocol import ProtocolFeature
from csi_vduse.errors import ProtocolError

QUEUES: Final = 2  # receive, transmit

_F_MAC: Final = 1 << 5
_F_STATUS: Final = 1 << 16
# Of a server's features (VIRTIO 1.3, 5.1.3): checksums, segmentation, merged buffers; none that takes a control queue.
_CARRIED: Final = (
    1 << 0  # CSUM
    | 1 << 1  # GUEST_CSUM
    | 0b1111 << 7  # GUEST_TSO4, GUEST_TSO6, GUEST_ECN, GUEST_UFO
    | 0b1111 << 11  # HOST_TSO4, HOST_TSO6, HOST_ECN, HOST_UFO
    | 1 << 15  # MRG_RXBUF
    | config_space.F_INDIRECT_DESC
    | config_space.F_EVENT_IDX
    | config_space.F_VERSION_1
)
_CONFIG: Final = struct.Struct("<6sHHH")  # mac, status, max_virtqueue_pairs, mtu (5.1.4)
_LINK_UP: Final = 1


class NetOffer(Offer):
    """What a server said of itself."""

    wanted: ClassVar = ProtocolFeature.MQ | ProtocolFeature.REPLY_ACK
    shows_config: ClassVar = False

    @property
    def queues(self) -> int:
        """How many a card may have; the server counts pairs."""
        return QUEUES * min(1, self.queue_count)

    @property
    def capacity_bytes(self) -> int:
        """Return 0: it is no disk."""
        return 0

    def check(self, *, read_only: bool, without_flush: bool, keeps_log: bool) -> None:
        """Refuse a server that cannot serve a card of ours.

        Raises:
            FailedPrecondition: it lacks what is needed.
            ProtocolError: what it says cannot be.
        """
        del read_only, without_flush, keeps_log
        self.check_language(ProtocolFeature.REPLY_ACK)
        if not self.queue_count:
            raise ProtocolError("the vhost-user server has no queues")

    def device_features(self, queues: int) -> int:
        """Feature bits that a card offers its driver."""
        del queues
        return self.features & _CARRIED | config_space.F_ACCESS_PLATFORM | _F_MAC | _F_STATUS

    @staticmethod
    def server_features(negotiated: int) -> int:
        """Feature bits to set at a server for a driver: the card's address and link are ours."""
        return Offer.server_features(negotiated & ~(_F_MAC | _F_STATUS))


def card_config(name: str) -> bytes:
    """Configuration space of the card of a name: its address is made of that, so that it stays the same.

    The address is one of those that anybody may choose (locally administered, IEEE 802).
    """
    address = bytearray(hashlib.sha256(name.encode()).digest()[:6])
    address[0] = address[0] & 0xFC | 0x02
    return _CONFIG.pack(bytes(address), _LINK_UP, 1, 0)
