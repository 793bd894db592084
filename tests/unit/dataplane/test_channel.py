"""Messages, descriptors and errors cross the control channel unharmed."""

import os
import socket
from collections.abc import Iterator

import pytest

from csi_vduse.dataplane import channel
from csi_vduse.errors import InvalidArgument, NotFound, Unavailable, VduseError


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, socket.socket]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_descriptors_arrive_with_their_message(pair):
    read_end, write_end = os.pipe()
    channel.send(pair[0], {"op": "start"}, [write_end])
    os.close(write_end)
    message, fds = channel.receive(pair[1])
    os.write(fds[0], b"through")
    assert (message, os.read(read_end, 100)) == ({"op": "start"}, b"through")
    os.close(fds[0])
    os.close(read_end)


def test_error_keeps_class_text_and_hint(pair):
    channel.send(pair[1], channel.error_answer(NotFound("no image", hint="make one")))
    with pytest.raises(NotFound, match=r"no image \(make one\)"):
        channel.call(pair[0], {"op": "start"})


def test_unknown_error_class_becomes_a_plain_error():
    with pytest.raises(VduseError, match="odd"):
        channel.raise_for_error({"ok": False, "error": "sequence", "message": "odd"})


def test_closed_channel_is_unavailable(pair):
    pair[1].close()
    with pytest.raises(Unavailable):
        channel.call(pair[0], {"op": "ping"})


@pytest.mark.parametrize("packet", [b"not json", b"[1]", b"[" * 10000, b"x" * (channel.MAX_PACKET_BYTES + 1)])
def test_foreign_packet_is_refused_and_leaks_no_descriptor(pair, packet):
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(pair[0], [packet], [0, 1])
    with pytest.raises(InvalidArgument):
        channel.receive(pair[1])
    assert len(os.listdir("/proc/self/fd")) == before
