"""The in-flight log: what a server left is served again, once, and no file of a front-end can harm us."""

from __future__ import annotations

import fcntl
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.unit.vhost_user.sessions import Running, reads_a_sector
from tests.vhost_user.frontend import SIZE, Frontend, state

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
PART = 320  # of one queue: a head and an entry for each descriptor, 16 bytes each, in whole 64 bytes


def description(size: int, queues: int = 1, entries: int = SIZE, offset: int = 0) -> bytes:
    return struct.pack("=QQHH4x", size, offset, queues, entries)


def asked_for(frontend: Frontend) -> tuple[int, int]:
    """Ask for a log; its descriptor and size."""
    frontend.send(Request.GET_INFLIGHT_FD, description(0))
    payload, fd = frontend.receive_fd()
    size, offset, queues, entries = struct.unpack("=QQHH4x", payload)
    assert (offset, queues, entries) == (0, 1, SIZE)
    return fd, size


def log_of(used: int, in_flight: dict[int, int]) -> int:
    """The file of a log as a server left it that died; in_flight: head and order."""
    states = [struct.pack("=B5xHQ", head in in_flight, 0, in_flight.get(head, 0)) for head in range(SIZE)]
    fd = os.memfd_create("left", os.MFD_ALLOW_SEALING)
    os.write(fd, struct.pack("=QHHHH", 0, 1, SIZE, 0, used) + b"".join(states))
    os.ftruncate(fd, 4096)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, SEALS)
    return fd


@pytest.fixture
def frontend(running: Running) -> Frontend:
    return running.frontend


@pytest.fixture
def closing() -> Iterator[list[int]]:
    fds: list[int] = []
    yield fds
    for fd in fds:
        os.close(fd)


def test_a_log_is_made_sealed_and_filled_while_the_ring_runs(frontend: Frontend, closing: list[int]) -> None:
    frontend.negotiate()
    frontend.give_memory()
    fd, size = asked_for(frontend)
    closing.append(fd)
    assert size >= PART
    assert fcntl.fcntl(fd, fcntl.F_GET_SEALS) & SEALS == SEALS
    assert frontend.acked(Request.SET_INFLIGHT_FD, description(size), (fd,))
    frontend.give_ring()
    frontend.enable()
    assert reads_a_sector(frontend)
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 1)
    with mmap.mmap(fd, size) as log:
        features, version, entries, _, used = struct.unpack_from("=QHHHH", log)
        assert (features, version, entries, used) == (0, 1, SIZE, 1)
        assert not any(log[16 + 16 * head] for head in range(SIZE))


def test_what_a_dead_server_left_is_served_again_in_order_and_once(
    running: Running, frontend: Frontend, closing: list[int]
) -> None:
    """Heads 0, 3, 6 were fetched; 3 had come back when the server died, 6 had been submitted before 0."""
    frontend.negotiate()
    frontend.give_memory()
    for head in (0, 3, 6, 9):
        frontend.describe(head)
    for head in (0, 3, 6):
        frontend.make_available(head)
    frontend.memory[0x2000 + 2 : 0x2000 + 12] = struct.pack("<HII", 1, 3, 513)
    closing.append(log_of(1, {0: 9, 6: 8}))
    assert frontend.acked(Request.SET_INFLIGHT_FD, description(PART), (closing[0],))
    frontend.give_ring(base=1)
    frontend.enable()
    frontend.make_available(9)
    while frontend.used() < 4:
        assert frontend.signalled(frontend.call)
    assert frontend.used_ids() == [3, 6, 0, 9]
    assert running.session._rings[0].served_again == 2
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 4)


def test_a_ring_that_its_driver_reset_starts_its_log_afresh(frontend: Frontend, closing: list[int]) -> None:
    frontend.negotiate()
    frontend.give_memory()
    fd, size = asked_for(frontend)
    closing.append(fd)
    frontend.give_ring()
    frontend.enable()
    for _ in range(3):
        assert reads_a_sector(frontend)
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 3)
    frontend.take_back(3)
    frontend.memory[0x2000:0x2004] = bytes(4)
    assert frontend.acked(Request.SET_INFLIGHT_FD, description(size), (fd,))
    frontend.give_ring(base=0)
    assert reads_a_sector(frontend)


def test_another_log_may_come_while_the_old_one_is_written(frontend: Frontend, closing: list[int]) -> None:
    frontend.negotiate()
    frontend.give_memory()
    closing.append(asked_for(frontend)[0])
    frontend.give_ring()
    frontend.enable()
    assert reads_a_sector(frontend)
    closing.append(asked_for(frontend)[0])
    assert reads_a_sector(frontend)


def test_a_log_of_another_queue_is_refused_at_the_start(frontend: Frontend, closing: list[int]) -> None:
    frontend.negotiate()
    frontend.give_memory()
    closing.append(log_of(SIZE + 7, {}))
    assert frontend.acked(Request.SET_INFLIGHT_FD, description(PART), (closing[0],))
    frontend.give_ring()
    assert not frontend.acked(Request.SET_VRING_ENABLE, state(0, 1))
    closing.append(asked_for(frontend)[0])
    assert frontend.acked(Request.SET_VRING_ENABLE, state(0, 1))
    assert reads_a_sector(frontend)


def test_files_that_can_be_taken_away_or_are_too_short_are_no_logs(
    frontend: Frontend, closing: list[int], tmp_path: Path
) -> None:
    frontend.negotiate()
    sealed = log_of(0, {})
    loose = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(loose, 4096)
    plain = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    os.ftruncate(plain, 4096)
    pipe = os.pipe()
    closing += [sealed, loose, plain, *pipe]
    for fd in (loose, plain, *pipe, frontend.kick):
        assert not frontend.acked(Request.SET_INFLIGHT_FD, description(PART), (fd,))
    for bad in (
        description(PART - 1),
        description(PART, queues=2),
        description(PART, queues=0),
        description(PART, entries=0),
        description(1 << 40, entries=2048),
        description(1 << 20),
        description(PART, offset=8),
        description(PART, offset=4096),
        description(2**64 - 1, offset=2**64 - 4096),
    ):
        assert not frontend.acked(Request.SET_INFLIGHT_FD, bad, (sealed,))
    assert frontend.acked(Request.SET_INFLIGHT_FD, description(PART), (sealed,))
