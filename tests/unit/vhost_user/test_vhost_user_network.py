"""What is shown of a vhost-user-net server, and what is refused (net_offer.py)."""

from __future__ import annotations

from pathlib import Path

import pytest

from csi_vduse.agent.model import Attachment, AttachSpec, State, attachment_from_json, attachment_to_json
from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.backend_spec import FileBackend, VhostUserBackend
from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.dataplane.vhost_user.net_offer import NetOffer, card_config
from csi_vduse.dataplane.vhost_user.protocol import ProtocolFeature
from csi_vduse.errors import FailedPrecondition, InvalidArgument, ProtocolError
from csi_vduse.vdpa.model import Bus

MAC, STATUS, CTRL_VQ, MQ = 1 << 5, 1 << 16, 1 << 17, 1 << 22
SERVER = VhostUserBackend(Path("/run/net.sock"))


def offer(features: int = config_space.F_VERSION_1, queues: int = 1, protocols: int = 1 << 3) -> NetOffer:
    return NetOffer(features, ProtocolFeature(protocols), queues, b"")


def check(what: NetOffer) -> None:
    what.check(read_only=False, without_flush=True, keeps_log=False)


def test_a_card_has_what_can_be_carried():
    """An address and a link, which are ours; not a control queue, nor what needs one."""
    everything = offer((1 << 40) - 1)
    shown = everything.device_features(2)
    assert shown & MAC
    assert shown & STATUS
    assert not shown & (CTRL_VQ | MQ | config_space.F_RING_PACKED)
    asked = everything.server_features(shown)
    assert not asked & (MAC | STATUS | config_space.F_ACCESS_PLATFORM)
    assert asked & protocol.F_PROTOCOL_FEATURES
    assert not offer(0).device_features(2) & config_space.F_VERSION_1


def test_a_card_keeps_its_address():
    """One of its own, that anybody may choose, and no group's; the link is up, with one pair of queues."""
    config = card_config("net-a")
    assert config == card_config("net-a")
    assert config[:6] != card_config("net-b")[:6]
    assert config[0] & 3 == 2
    assert config[6:] == b"\1\0\1\0\0\0"


@pytest.mark.parametrize(
    ("what", "error"),
    [
        (offer(0), FailedPrecondition),
        (offer(queues=0), ProtocolError),
        (offer(protocols=1), FailedPrecondition),
    ],
)
def test_a_server_that_will_not_do(what: NetOffer, error: type[Exception]):
    check(offer())
    with pytest.raises(error):
        check(what)


@pytest.mark.parametrize(
    "change", [{"backend": FileBackend(Path("/a"))}, {"bus": Bus.VHOST}, {"packed": True}], ids=str
)
def test_what_cannot_be_a_card(change: dict[str, object]):
    with pytest.raises(InvalidArgument, match="network card"):
        AttachSpec(**{"volume_id": "n", "backend": SERVER, "capacity_bytes": 0, "is_network": True, **change})


def test_its_record():
    """It is read back as it was; queues are a pair, whatever the node's default is."""
    spec = AttachSpec("n", SERVER, 0, is_network=True).with_defaults(queues=8)
    assert spec.queues == 2
    made = Attachment(spec, State.ATTACHED)
    assert attachment_from_json(attachment_to_json(made)) == made
