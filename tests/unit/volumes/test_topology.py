"""Topology: a file volume is usable at one node."""

import pytest

from csi_vduse.volumes.topology import TOPOLOGY_KEY, TopologyRequirement, node_segments, satisfies

HERE = node_segments("n1")
THERE = node_segments("n2")


@pytest.mark.parametrize(
    ("requirement", "expected"),
    [
        (None, True),
        (TopologyRequirement(), True),
        (TopologyRequirement(requisite=(HERE,)), True),
        (TopologyRequirement(requisite=(THERE, HERE), preferred=(THERE,)), True),
        (TopologyRequirement(requisite=(THERE,)), False),
        (TopologyRequirement(requisite=(THERE,), preferred=(HERE,)), False),
        (TopologyRequirement(preferred=(THERE, HERE)), True),
        (TopologyRequirement(preferred=(THERE,)), False),
        (TopologyRequirement(requisite=({TOPOLOGY_KEY.upper(): "n1"},)), True),
        (TopologyRequirement(requisite=({"example.com/zone": "a"},)), False),
        (TopologyRequirement(requisite=({**HERE, "example.com/zone": "a"},)), False),
        (TopologyRequirement(requisite=({},)), True),
    ],
)
def test_requirement_is_met_only_by_this_node(requirement, expected):
    assert satisfies(requirement, HERE) is expected
