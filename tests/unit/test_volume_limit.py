"""The number of volumes that a node promises follows from what it has."""

from __future__ import annotations

import pytest

from csi_vduse.agent.limits import Machine, this_machine, volume_limit

GIB = 1 << 30
BIG = Machine(memory_bytes=512 * GIB, open_files=1 << 20, processes=1 << 20)


def test_a_big_machine_is_bounded_by_what_was_tried():
    assert volume_limit(BIG, queues=4) == 256


@pytest.mark.parametrize(
    ("machine", "limit"),
    [
        (Machine(8 * GIB, BIG.open_files, BIG.processes), 42),
        (Machine(BIG.memory_bytes, 1024, BIG.processes), 240),
        (Machine(BIG.memory_bytes, BIG.open_files, 1000), 100),
    ],
    ids=["memory", "descriptors", "processes"],
)
def test_the_scarcest_thing_decides(machine: Machine, limit: int):
    assert volume_limit(machine, queues=4) == limit


def test_the_smallest_machine_still_takes_a_volume():
    assert volume_limit(Machine(64 << 20, 16, 4), queues=16) == 1


def test_this_machine_can_be_asked():
    assert volume_limit(this_machine(), queues=1) >= 1
