"""Rings start, stop, break and are reset as a front-end says."""

from __future__ import annotations

import os
import socket
import struct

from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.unit.vhost_user.sessions import SLOTS, SPEC, Running, reads_a_sector
from tests.vhost_user.frontend import (
    AVAIL,
    FEATURES,
    MEMORY_BYTES,
    PROTOCOL_FEATURES,
    SIZE,
    USER,
    Frontend,
    number,
    state,
)


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
