"""What is left in a pool: promises count, never what happens to be allocated."""

from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.backends.accounting import available_bytes
from csi_vduse.backends.base import PoolUsage
from csi_vduse.volumes.model import State
from tests.unit.backends.builders import MIB, a_snapshot, a_volume

USAGE = PoolUsage(total_bytes=100 * MIB, foreign_bytes=10 * MIB, snapshot_bytes=5 * MIB)


def left(volumes=(), snapshots=(), usage=USAGE):
    return available_bytes(usage, pool="default", volumes=volumes, snapshots=snapshots)


def test_foreign_files_and_snapshots_are_subtracted():
    assert left() == 85 * MIB


def test_volumes_count_with_what_they_may_become():
    assert left([a_volume(capacity_bytes=20 * MIB)]) == 65 * MIB
    assert left([a_volume(capacity_bytes=20 * MIB, expanding_to_bytes=30 * MIB)]) == 55 * MIB


def test_volumes_count_in_every_state():
    for state in State:
        assert left([a_volume(capacity_bytes=20 * MIB, state=state)]) == 65 * MIB


def test_other_pools_do_not_count():
    assert left([a_volume(pool="other")], [a_snapshot(pool="other")]) == 85 * MIB


def test_an_unfinished_snapshot_counts_with_its_full_size_a_finished_one_is_measured():
    assert left((), [a_snapshot(state=State.CREATING)]) == 81 * MIB
    assert left((), [a_snapshot(state=State.READY)]) == 85 * MIB


@given(st.lists(st.integers(min_value=0, max_value=1 << 62), max_size=8))
def test_what_is_left_is_never_negative(capacities):
    assert left([a_volume(capacity_bytes=capacity) for capacity in capacities]) >= 0
