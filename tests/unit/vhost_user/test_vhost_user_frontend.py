"""What a front-end believes of a server, and what it does not: one that answers as each test says."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.vhost_user import offer, requests
from csi_vduse.dataplane.vhost_user.frontend import FrontEnd
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.dataplane.vhost_user.protocol import MemoryRegion, ProtocolFeature, Request
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, ProtocolError, Unavailable

REPLY = 1 | 1 << 2
SPEC = DeviceSpec("disk", 64 << 20, queues=4)
OFFERED = SPEC.features & ~config_space.F_ACCESS_PLATFORM | 1 << 30
PROTOCOL = int(offer.Offer.wanted)
Answer = Callable[[int, bytes], bytes]


def reply(request: int, payload: bytes, flags: int = REPLY) -> bytes:
    return struct.pack("=III", request, flags, len(payload)) + payload


def number(request: int, value: int) -> bytes:
    return reply(request, struct.pack("=Q", value))


def honest(request: int, payload: bytes) -> bytes:
    answers: dict[int, bytes] = {
        Request.GET_FEATURES: number(request, OFFERED),
        Request.GET_PROTOCOL_FEATURES: number(request, PROTOCOL),
        Request.SET_PROTOCOL_FEATURES: b"",
        Request.GET_QUEUE_NUM: number(request, 128),
        Request.GET_CONFIG: reply(request, payload[:12] + SPEC.config()),
        Request.GET_VRING_BASE: reply(request, payload[:4] + struct.pack("=I", 7)),
    }
    return answers.get(request, number(request, 0))


def but(request: Request, answer: Answer | bytes) -> Answer:
    """Honest but in one thing."""

    def answers(asked: int, payload: bytes) -> bytes:
        if asked != request:
            return honest(asked, payload)
        return answer if isinstance(answer, bytes) else answer(asked, payload)

    return answers


@contextmanager
def server(answers: Answer, timeout_s: float = 10) -> Iterator[FrontEnd]:
    ours, theirs = socket.socketpair()

    def serve() -> None:
        with theirs, suppress(OSError):
            while header := theirs.recv(12, socket.MSG_WAITALL):
                request, _, size = struct.unpack("=III", header)
                payload = theirs.recv(size, socket.MSG_WAITALL) if size else b""
                answer = answers(request, payload)
                if answer == b"hang up":
                    break
                theirs.sendall(answer)

    thread = threading.Thread(target=serve)
    thread.start()
    link = FrontEnd(ours, timeout_s=timeout_s)
    try:
        yield link
    finally:
        link.shut()
        link.close()
        thread.join(10)


def test_an_honest_server_is_heard() -> None:
    with server(honest) as link:
        found = link.negotiate()
        assert (found.capacity_bytes, found.block_size_bytes, found.queues) == (64 << 20, 512, 4)
        found.check(read_only=False, without_flush=False, keeps_log=True)
        link.set_features(1)
        assert link.stop_ring(0) == 7


@pytest.mark.parametrize(
    ("request_", "answer", "says"),
    [
        (Request.GET_FEATURES, number(Request.SET_OWNER, 0), "was answered with request 3"),
        (Request.GET_FEATURES, reply(1, bytes(8), flags=1), "flags 0x1"),
        (Request.GET_FEATURES, reply(1, bytes(4)), "4 bytes instead of 8"),
        (Request.GET_FEATURES, reply(1, bytes(1 << 20)), "1048576 bytes instead of 8"),
        (Request.GET_FEATURES, number(1, 1 << 32), "knows no protocol features"),
        (Request.SET_OWNER, number(3, 1), "refused SET_OWNER"),
        (
            Request.GET_CONFIG,
            lambda r, p: reply(r, struct.pack("=III", 8, 60, 0) + bytes(60)),
            "60 bytes at 8",
        ),
        (Request.GET_CONFIG, lambda r, _: reply(r, b""), "0 bytes instead of 72"),
    ],
)
def test_what_does_not_fit_what_was_asked_is_not_believed(
    request_: Request, answer: Answer | bytes, says: str
) -> None:
    with server(but(request_, answer)) as link, pytest.raises(ProtocolError, match=says):
        link.negotiate()


@pytest.mark.parametrize(
    "answer",
    [
        lambda r, _: reply(r, struct.pack("=II", 1, 0)),
        lambda r, p: reply(r, p[:4] + struct.pack("=I", 1 << 16)),
    ],
    ids=["another queue", "no place in a ring"],
)
def test_a_queue_that_stops_elsewhere_is_not_believed(answer: Answer) -> None:
    with server(but(Request.GET_VRING_BASE, answer)) as link:
        link.negotiate()
        with pytest.raises(ProtocolError, match="stopped"):
            link.stop_ring(0)


def test_a_server_that_hangs_up_is_gone() -> None:
    with server(but(Request.GET_CONFIG, b"hang up")) as link, pytest.raises(Unavailable, match="closed"):
        link.negotiate()


def test_a_server_that_says_nothing_is_waited_for_so_long() -> None:
    silent = but(Request.GET_CONFIG, b"")
    with (
        server(silent, timeout_s=0.1) as link,
        pytest.raises(DeadlineExceeded, match="has not answered"),
    ):
        link.negotiate()


def test_what_nobody_asked_for_ends_the_connection() -> None:
    with server(but(Request.SET_FEATURES, number(2, 0) + number(2, 0))) as link:
        link.negotiate()
        link.set_features(1)
        with pytest.raises(ProtocolError, match="what was not asked"):
            link.listen()


def lies(**changes: object) -> Offer:
    said: dict[str, object] = {
        "features": OFFERED,
        "protocol_features": ProtocolFeature(PROTOCOL),
        "queue_count": 4,
        "config": SPEC.config(),
        **changes,
    }
    return Offer(**said)  # type: ignore[arg-type]


PLACES = {"capacity": (0, "<Q"), "seg_max": (12, "<I"), "blk_size": (20, "<I"), "num_queues": (34, "<H")}


def config(**changes: int) -> bytes:
    shown = bytearray(SPEC.config())
    for name, value in changes.items():
        at, layout = PLACES[name]
        struct.pack_into(layout, shown, at, value)
    return bytes(shown)


@pytest.mark.parametrize(
    ("said", "error", "says"),
    [
        (lies(features=OFFERED & ~config_space.F_VERSION_1), FailedPrecondition, "virtio 1"),
        (lies(features=OFFERED & ~config_space.F_FLUSH), FailedPrecondition, "cannot flush"),
        (lies(protocol_features=ProtocolFeature.CONFIG), FailedPrecondition, "REPLY_ACK"),
        (lies(config=config(capacity=0)), ProtocolError, "a disk of 0 bytes"),
        (lies(config=config(blk_size=513)), ProtocolError, "blocks of 513"),
        (lies(config=config(blk_size=1 << 31)), ProtocolError, "blocks of"),
        (lies(config=config(capacity=7, blk_size=4096)), ProtocolError, "a disk of 3584 bytes"),
        (lies(queue_count=0), ProtocolError, "no queues"),
        (lies(config=config(num_queues=0)), ProtocolError, "no queues"),
    ],
)
def test_a_server_that_cannot_be_is_refused(said: Offer, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        said.check(read_only=False, without_flush=False, keeps_log=True)


def test_what_a_server_cannot_do_may_be_allowed() -> None:
    lies(features=OFFERED & ~config_space.F_FLUSH).check(read_only=False, without_flush=True, keeps_log=True)
    lies(features=OFFERED | config_space.F_RO).check(read_only=True, without_flush=False, keeps_log=True)
    with pytest.raises(FailedPrecondition, match="lets the disk be written"):
        lies().check(read_only=True, without_flush=False, keeps_log=True)


def test_a_device_shows_what_its_server_does_and_vduse_takes() -> None:
    config_wce = 1 << 11
    said = lies(features=OFFERED | config_wce | config_space.F_RING_PACKED)
    assert said.device_features(4) == SPEC.features
    assert said.device_features(1) == SPEC.features & ~config_space.F_MQ
    mediated = said.mediated_features(1, read_only=True, packed=True)
    rings = config_space.F_RING_PACKED | config_space.F_EVENT_IDX | config_space.F_ACCESS_PLATFORM
    assert mediated & (config_space.F_RO | rings) == config_space.F_RO | rings
    assert not mediated & (config_space.F_DISCARD | config_space.F_MQ | config_wce)
    shown = said.device_config(2, 32 << 20, pieces=62)
    assert shown == config(capacity=(32 << 20) // 512, num_queues=2, seg_max=62)
    shown = said.device_config(2, 32 << 20)
    assert shown == config(capacity=(32 << 20) // 512, num_queues=2)
    assert lies(queue_count=2).queues == 2
    assert lies(features=OFFERED & ~config_space.F_MQ).queues == 1


def test_more_memory_than_a_table_holds_is_refused() -> None:
    region = MemoryRegion(0, 4096, 0, 0)
    with pytest.raises(ProtocolError, match="9 pieces"):
        requests.memory_table([region] * 9)
