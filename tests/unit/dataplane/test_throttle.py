"""Limits as a value: what can never be kept is refused, what travels arrives."""

import pytest

from csi_vduse.dataplane import throttle
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import InvalidArgument


@pytest.mark.parametrize(
    "values",
    [
        {"iops": -1},
        {"iops": 10**7 + 1},
        {"bytes_per_s": 4095},
        {"bytes_per_s": -4096},
        {"bytes_per_s": (1 << 36) + 1},
        {"burst_s": 0},
        {"burst_s": 3601},
        {"burst_s": float("nan")},
        {"burst_s": float("inf")},
    ],
)
def test_what_cannot_be_kept_is_refused(values):
    with pytest.raises(InvalidArgument, match="allowed"):
        Throttle(**values)


def test_limits_survive_json():
    limits = Throttle(5, 1 << 20, 0.25)
    assert throttle.from_json(throttle.to_json(limits)) == limits


def test_nothing_said_is_no_limit():
    assert throttle.from_json(None) == Throttle() == throttle.UNLIMITED
