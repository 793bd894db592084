"""A session does what a front-end's messages say or refuses them; it leaks no descriptor either way."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.backend_spec import BackendSpec, FileBackend, NullBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.connection import Connection
from csi_vduse.dataplane.vhost_user.protocol import Request
from csi_vduse.dataplane.vhost_user.session import Session
from csi_vduse.errors import ProtocolError, Unavailable
from tests.vhost_user.frontend import (
    AVAIL,
    FEATURES,
    GUEST,
    MEMORY_BYTES,
    PROTOCOL_FEATURES,
    SIZE,
    USER,
    Frontend,
    number,
    region,
    state,
)

SPEC = DeviceSpec("disk", 64 << 20, queues=2, queue_size=128)
SLOTS = 12


def open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


class Running:
    """A session served by a thread, as the server's loop would."""

    def __init__(self, engine: Engine) -> None:
        ours, theirs = socket.socketpair()
        self.frontend = Frontend(theirs)
        self.session = Session(Connection(ours), engine, SPEC, memory_slots=SLOTS)
        self.ended: Exception | None = None
        self._sock = ours
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                select.select([self._sock], [], [])
                self.session.handle_input()
        except (ProtocolError, Unavailable) as error:
            self.ended = error
        finally:
            self.session.close()

    def join(self) -> Exception | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.ended


@contextmanager
def serving(backend: BackendSpec) -> Iterator[Running]:
    """A session over an engine; whatever happens in it, no descriptor is left."""
    before = open_files()
    event_fd = os.eventfd(0)
    engine = Engine(
        backend=backend,
        capacity_bytes=SPEC.capacity_bytes,
        block_size_bytes=512,
        max_queues=SPEC.queues,
        read_only=False,
        serial="disk",
        event_fd=event_fd,
    )
    running = Running(engine)
    try:
        yield running
    finally:
        running.frontend.close()
        running.join()
        engine.close()
        os.close(event_fd)
    assert open_files() == before


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SPEC.capacity_bytes)
    with serving(FileBackend(image)) as made:
        yield made


@pytest.fixture
def frontend(running: Running) -> Frontend:
    return running.frontend


def reads_a_sector(frontend: Frontend) -> bool:
    while frontend.signalled(frontend.call, 0):
        pass
    used = frontend.used()
    frontend.submit()
    while frontend.used() == used:
        if not frontend.signalled(frontend.call):
            return False
    return frontend.used() == used + 1 and frontend.sector() == (0, bytes(512))


def test_what_is_offered_fits_a_disk_without_iommu(frontend: Frontend) -> None:
    (features,) = struct.unpack("=Q", frontend.ask(Request.GET_FEATURES))
    assert not features & config_space.F_ACCESS_PLATFORM
    for bit in (config_space.F_VERSION_1, config_space.F_EVENT_IDX, config_space.F_INDIRECT_DESC, 1 << 30):
        assert features & bit
    assert not features & 1 << 26  # LOG_ALL: what it writes to is not logged
    assert frontend.ask(Request.GET_QUEUE_NUM) == number(2)
    assert frontend.ask(Request.GET_MAX_MEM_SLOTS) == number(SLOTS)
    asked = struct.pack("=III", 0, 60, 0) + bytes(60)
    assert frontend.ask(Request.GET_CONFIG, asked) == struct.pack("=III", 0, 60, 0) + SPEC.config()


def test_a_ring_serves_once_it_is_enabled(frontend: Frontend) -> None:
    frontend.negotiate()
    frontend.give_memory()
    frontend.give_ring()
    frontend.submit()
    assert not frontend.signalled(frontend.call, 0.1)
    assert frontend.used() == 0
    frontend.enable()
    assert frontend.signalled(frontend.call)
    while frontend.used() == 0:
        assert frontend.signalled(frontend.call)
    assert frontend.sector() == (0, bytes(512))


def test_a_ring_is_enabled_from_the_start_without_protocol_features(frontend: Frontend) -> None:
    frontend.negotiate(features=1 << 32)
    frontend.give_memory()
    frontend.give_ring()
    assert reads_a_sector(frontend)


def test_a_disabled_ring_takes_nothing_and_goes_on_when_enabled(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    frontend.enable(0)
    while frontend.signalled(frontend.call, 0):
        pass
    frontend.submit()
    assert not frontend.signalled(frontend.call, 0.1)
    frontend.enable(1)
    assert frontend.signalled(frontend.call)
    assert frontend.used() == 2


def test_get_vring_base_stops_a_ring_and_says_how_far_it_came(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    assert reads_a_sector(frontend)
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 2)
    while frontend.signalled(frontend.call, 0):
        pass
    frontend.submit()
    assert not frontend.signalled(frontend.call, 0.1)
    assert frontend.used() == 2
    frontend.give_ring(base=2)
    while frontend.used() == 2:
        assert frontend.signalled(frontend.call)
    assert frontend.used() == 3


def test_another_call_eventfd_takes_over_while_the_ring_runs(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    while frontend.signalled(frontend.call, 0.2):
        pass  # the interrupt of what was used a moment ago
    other = os.eventfd(0)
    assert frontend.acked(Request.SET_VRING_CALL, number(0), (other,))
    frontend.submit()
    assert frontend.signalled(other)
    assert not frontend.signalled(frontend.call, 0)
    os.close(other)
    assert frontend.acked(Request.SET_VRING_CALL, number(0 | 256))
    frontend.submit()
    while frontend.used() < 3:
        pass


def test_memory_comes_and_goes_while_a_ring_runs(frontend: Frontend) -> None:
    frontend.start()
    more = os.memfd_create("more")
    os.ftruncate(more, MEMORY_BYTES)
    far = region(GUEST + (1 << 40), MEMORY_BYTES, USER + (1 << 40))
    for _ in range(3):
        assert frontend.acked(Request.ADD_MEM_REG, bytes(8) + far, (more,))
        assert reads_a_sector(frontend)
        assert frontend.acked(Request.REM_MEM_REG, bytes(8) + far)
        assert reads_a_sector(frontend)
    os.close(more)


def test_a_ring_whose_memory_is_taken_and_given_back_goes_on(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    own = bytes(8) + region(GUEST, MEMORY_BYTES, USER)
    assert frontend.acked(Request.REM_MEM_REG, own, (frontend.memory_fd,))  # one too many, to be closed
    frontend.submit()
    assert frontend.used() == 1
    assert frontend.acked(Request.ADD_MEM_REG, own, (frontend.memory_fd,))
    while frontend.used() == 1:
        assert frontend.signalled(frontend.call)
    assert frontend.sector() == (0, bytes(512))


def test_memory_regions_never_overlap_and_slots_are_limited(frontend: Frontend) -> None:
    frontend.negotiate()
    frontend.give_memory()
    fds = (frontend.memory_fd,)
    for bad in (
        region(GUEST, 4096, USER + (1 << 40)),
        region(GUEST + MEMORY_BYTES - 1, 4096, USER + (1 << 40)),
        region(GUEST + (1 << 40), 4096, USER + 4096),
    ):
        assert not frontend.acked(Request.ADD_MEM_REG, bytes(8) + bad, fds)
    for slot in range(1, SLOTS):
        good = region(GUEST + slot * (1 << 30), 4096, USER + slot * (1 << 30))
        assert frontend.acked(Request.ADD_MEM_REG, bytes(8) + good, fds)
    more = region(GUEST + (1 << 40), 4096, USER + (1 << 40))
    assert not frontend.acked(Request.ADD_MEM_REG, bytes(8) + more, fds)
    assert not frontend.acked(Request.REM_MEM_REG, bytes(8) + more)
    whole = struct.pack("=II", 2, 0) + region(GUEST, 8192, USER) + region(GUEST + 4096, 4096, USER + 8192)
    assert not frontend.acked(Request.SET_MEM_TABLE, whole, fds * 2)


def test_memory_that_cannot_be_mapped_changes_nothing(frontend: Frontend) -> None:
    frontend.start()
    reading, writing = os.pipe()
    far = region(GUEST + (1 << 40), MEMORY_BYTES, USER + (1 << 40))
    assert not frontend.acked(Request.ADD_MEM_REG, bytes(8) + far, (reading,))
    os.close(reading)
    os.close(writing)
    assert reads_a_sector(frontend)


def test_guest_memory_of_huge_pages_is_mapped_at_any_offset(frontend: Frontend) -> None:
    frontend.start()
    huge = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(huge, 4 << 20)
    # As QEMU cuts a PC's memory: it begins and ends within huge pages.
    for offset, size in ((0xC0000, (2 << 20) - 0xC0000), (0xC0000, 0x100000), (0, 0xA0000)):
        cut = bytes(8) + region(GUEST + (1 << 40), size, USER + (1 << 40), offset)
        assert frontend.acked(Request.ADD_MEM_REG, cut, (huge,))
        assert reads_a_sector(frontend)
        assert frontend.acked(Request.REM_MEM_REG, cut)
    os.close(huge)


def test_huge_pages_that_are_not_there_stop_the_ring_and_nothing_else(frontend: Frontend) -> None:
    frontend.negotiate()
    huge = os.memfd_create("huge", os.MFD_HUGETLB)
    os.ftruncate(huge, 2 << 20)
    os.ftruncate(huge, 0)
    cut = bytes(8) + region(GUEST, 2 << 20, USER)
    assert frontend.acked(Request.ADD_MEM_REG, cut, (huge,))
    frontend.give_ring()
    frontend.acked(Request.SET_VRING_ENABLE, state(0, 1))
    os.eventfd_write(frontend.kick, 1)
    assert frontend.acked(Request.REM_MEM_REG, cut)
    frontend.give_memory()
    frontend.ask(Request.GET_VRING_BASE, state(0, 0))
    frontend.give_ring()
    assert reads_a_sector(frontend)
    os.close(huge)


def test_a_ring_outside_the_memory_is_refused_when_it_would_start(frontend: Frontend) -> None:
    frontend.negotiate()
    frontend.give_memory()
    frontend.give_ring()
    bad = struct.pack("=IIQQQQ", 0, 0, USER + MEMORY_BYTES - 16, USER + 0x2000, USER + AVAIL, 0)
    assert frontend.acked(Request.SET_VRING_ADDR, bad)
    assert not frontend.acked(Request.SET_VRING_ENABLE, state(0, 1))
    assert frontend.signalled(frontend.error)
    assert frontend.acked(Request.SET_VRING_ADDR, Frontend.addresses())
    assert reads_a_sector(frontend)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (Request.SET_VRING_NUM, state(2, SIZE)),
        (Request.SET_VRING_NUM, state(0, 0)),
        (Request.SET_VRING_NUM, state(0, 3)),
        (Request.SET_VRING_NUM, state(0, 1 << 16)),
        (Request.SET_VRING_BASE, state(0, 1 << 31 | 1 << 16)),
        (Request.SET_VRING_ENABLE, state(2**32 - 1, 1)),
        (Request.SET_VRING_ENABLE, state(0, 2)),
        (Request.SET_VRING_ADDR, Frontend.addresses(2)),
        (Request.SET_VRING_ADDR, Frontend.addresses(flags=1)),
        (Request.SET_VRING_KICK, number(0 | 256)),
        (Request.SET_VRING_CALL, number(255 | 256)),
        (Request.SET_FEATURES, number(1 << 26)),
        (Request.SET_PROTOCOL_FEATURES, number(1 << 1)),
        (Request.SET_CONFIG, struct.pack("=III", 32, 1, 0) + b"\0"),
        (6, bytes(16)),
    ],
)
def test_what_cannot_be_done_is_refused_and_the_connection_goes_on(
    frontend: Frontend, request_: Request, payload: bytes
) -> None:
    frontend.start()
    assert not frontend.acked(request_, payload)
    assert frontend.ask(Request.GET_QUEUE_NUM) == number(2)


def test_descriptors_that_are_no_eventfds_or_sockets_are_refused(frontend: Frontend) -> None:
    frontend.start()
    for request in (Request.SET_VRING_KICK, Request.SET_VRING_CALL, Request.SET_VRING_ERR):
        assert not frontend.acked(request, number(0), (frontend.memory_fd,))
    assert not frontend.acked(Request.SET_BACKEND_REQ_FD, b"", (frontend.kick,))
    assert reads_a_sector(frontend)


def test_a_refusal_ends_the_connection_of_a_front_end_that_asked_for_no_answer(running: Running) -> None:
    running.frontend.negotiate()
    running.frontend.send(Request.SET_VRING_NUM, state(7, 16))
    assert isinstance(running.join(), ProtocolError)


def test_a_full_eventfd_of_the_front_end_blocks_nobody(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    for fd in (frontend.kick, frontend.call, frontend.error):
        while frontend.signalled(fd, 0):
            pass
        os.set_blocking(fd, True)
        os.eventfd_write(fd, 2**64 - 2)
    for request, fd in ((Request.SET_VRING_CALL, frontend.call), (Request.SET_VRING_KICK, frontend.kick)):
        assert frontend.acked(request, number(0), (fd,))
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 1)


def test_a_broken_chain_stops_the_ring_until_it_is_set_up_again(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    frontend.make_available(SIZE)  # no such head
    frontend.submit()
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0))
    assert frontend.used() == 1
    frontend.take_back(2)
    frontend.give_ring(base=1)
    assert reads_a_sector(frontend)


def test_a_reset_forgets_the_rings_and_keeps_the_memory(frontend: Frontend) -> None:
    frontend.start()
    assert reads_a_sector(frontend)
    frontend.send(Request.SET_PROTOCOL_FEATURES, number(PROTOCOL_FEATURES | 1 << 13))
    assert frontend.acked(Request.RESET_DEVICE)
    while frontend.signalled(frontend.call, 0):
        pass
    frontend.submit()
    assert not frontend.signalled(frontend.call, 0.1)
    frontend.send(Request.SET_FEATURES, number(FEATURES))
    frontend.give_ring(base=1)
    frontend.enable()
    while frontend.used() == 1:
        assert frontend.signalled(frontend.call)


def test_a_new_capacity_is_told_on_the_back_ends_own_channel(running: Running) -> None:
    frontend = running.frontend
    ours, theirs = socket.socketpair()
    with ours, theirs:
        frontend.negotiate(protocol_features=PROTOCOL_FEATURES | 1 << 5)
        assert frontend.acked(Request.SET_BACKEND_REQ_FD, b"", (theirs.fileno(),))
        running.session.resized(DeviceSpec("disk", 128 << 20, queues=2, queue_size=128))
        ours.settimeout(10)
        assert ours.recv(100) == struct.pack("=III", 2, 1, 0)
        asked = struct.pack("=III", 0, 8, 0) + bytes(8)
        assert frontend.ask(Request.GET_CONFIG, asked)[12:] == struct.pack("<Q", (128 << 20) // 512)


def test_a_message_may_come_in_pieces(frontend: Frontend) -> None:
    message = struct.pack("=III", Request.GET_CONFIG, 1, 20) + struct.pack("=III", 20, 8, 0) + bytes(8)
    for byte in message[:-1]:
        frontend.send_raw(bytes([byte]))
    frontend.send_raw(message[-1:] + struct.pack("=III", Request.GET_QUEUE_NUM, 1, 0))
    assert frontend.receive()[1][12:] == SPEC.config()[20:28]
    assert frontend.receive() == (Request.GET_QUEUE_NUM, number(2))


def test_a_front_end_that_reads_no_answers_is_left(running: Running) -> None:
    with contextlib.suppress(OSError):
        while True:
            running.frontend.send(Request.GET_FEATURES)
    assert isinstance(running.join(), Unavailable)


def test_more_descriptors_than_a_message_may_have_end_the_connection(running: Running) -> None:
    running.frontend.send(Request.SET_OWNER, fds=(running.frontend.kick,) * 9)
    assert isinstance(running.join(), ProtocolError)


MESSAGES = st.tuples(
    st.one_of(st.sampled_from([int(r) for r in Request]), st.integers(0, 45)),
    st.sampled_from([1, 1, 1, 9, 9, 0, 5]),
    st.one_of(
        st.binary(max_size=64),
        st.builds(state, st.integers(0, 3), st.integers(0, 2048)),
        st.builds(number, st.integers(0, 3)),
        st.just(struct.pack("=II", 1, 0) + region(GUEST, MEMORY_BYTES, USER)),
        st.just(bytes(8) + region(GUEST, MEMORY_BYTES, USER)),
        st.just(Frontend.addresses()),
        st.just(b""),
    ),
    st.integers(0, 3),
)


@settings(max_examples=60)
@given(st.booleans(), st.lists(MESSAGES, max_size=25))
def test_no_sequence_of_messages_does_more_than_end_its_connection(
    started: bool, messages: list[tuple[int, int, bytes, int]]
) -> None:
    with serving(NullBackend()) as running:
        frontend = running.frontend
        if started:
            frontend.start()
        kinds = (frontend.memory_fd, frontend.kick, frontend.call)
        with contextlib.suppress(OSError):  # it may have ended the connection already
            for request, flags, payload, fds in messages:
                frontend.send(request, payload, kinds[:fds], flags=flags)
            frontend.sock.shutdown(socket.SHUT_WR)
        assert isinstance(running.join(), (ProtocolError, Unavailable))
