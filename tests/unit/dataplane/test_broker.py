"""What a worker makes of its broker's answers (csi_vduse/dataplane/broker.py)."""

import os
import socket
from collections.abc import Iterator

import pytest

from csi_vduse.dataplane import broker
from csi_vduse.errors import Unavailable


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The worker's end, and the broker's."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        yield ours, theirs


def test_a_connection_and_a_channel_for_changes(channel: tuple[socket.socket, socket.socket]) -> None:
    """What comes is what was sent."""
    ours, theirs = channel
    pairs = [socket.socketpair() for _ in range(3)]
    socket.send_fds(theirs, [b"+"], [near.fileno() for near, _ in pairs])
    sock, changes = broker.dial(ours)
    for got, (near, far) in zip((sock, *changes), pairs, strict=True):
        with got, near, far:
            got.sendall(b"x")
            assert far.recv(1) == b"x"


def test_a_reason(channel: tuple[socket.socket, socket.socket]) -> None:
    """A server that is not there, in words."""
    channel[1].send(b"no such server")
    with pytest.raises(Unavailable, match="no such server"):
        broker.dial(channel[0])


def test_less_than_a_connection(channel: tuple[socket.socket, socket.socket]) -> None:
    """A full table of descriptors has the kernel deliver some of them: none is kept, and it can be tried again."""
    before = set(os.listdir("/proc/self/fd"))
    socket.send_fds(channel[1], [b"+"], [0, 0])
    with pytest.raises(Unavailable, match="descriptors"):
        broker.dial(channel[0])
    assert set(os.listdir("/proc/self/fd")) == before
