"""Memory of a front-end comes, goes and may be of huge pages while rings run on it."""

from __future__ import annotations

import os
import struct

from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.unit.vhost_user.sessions import SLOTS, reads_a_sector
from tests.vhost_user.frontend import (
    GUEST,
    MEMORY_BYTES,
    USER,
    Frontend,
    region,
    state,
)


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
