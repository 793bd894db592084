"""What a front-end must not say is refused, and costs at most its connection."""

from __future__ import annotations

import contextlib
import os
import socket
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from csi_vduse.dataplane.backend_spec import NullBackend
from csi_vduse.dataplane.vhost_user.protocol import Request
from csi_vduse.errors import ProtocolError, Unavailable
from tests.unit.vhost_user.sessions import SPEC, Running, reads_a_sector, serving
from tests.vhost_user.frontend import (
    GUEST,
    MEMORY_BYTES,
    SIZE,
    USER,
    Frontend,
    number,
    region,
    state,
)


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
