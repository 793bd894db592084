"""Where a new volume goes, from what nodes say and what is promised already."""

import datetime as dt

import pytest

from csi_vduse.errors import InvalidArgument, ResourceExhausted
from csi_vduse.services.nodes_view import NodesView, default_pool
from csi_vduse.volumes.kubernetes_objects import volume_object
from csi_vduse.volumes.topology import TopologyRequirement, node_segments
from tests.unit.volumes.test_registry_directory import a_volume

GIB = 1 << 30


class Held:
    """A mirror that holds what it is given."""

    def __init__(self, *found):
        self.found = list(found)

    def all(self):
        return self.found

    def get(self, name):
        return next((each for each in self.found if each["metadata"]["name"] == name), None)


def node(name, *, gib=10, pool="default", silent_s=0, problem=""):
    seen = dt.datetime.now(dt.UTC) - dt.timedelta(seconds=silent_s)
    pools = [{"name": pool, "kind": "file", "totalBytes": gib * GIB, "foreignBytes": 0, "snapshotBytes": 0}]
    if problem:
        pools = [{"name": pool, "kind": "file", "problem": problem}]
    return {
        "metadata": {"name": name},
        "status": {"ready": True, "lastSeen": seen.isoformat(), "pools": pools},
    }


def asked(name, on, gib, **status):
    return {**volume_object(a_volume(name, node=on, capacity_bytes=gib * GIB)), "status": status}


def view(*nodes, volumes=()):
    return NodesView(nodes=Held(*nodes), volumes=Held(*volumes), snapshots=Held())


async def chosen(found, requirement=None, gib=1, pool="default", **only):
    return found.choose(await found.pools(), requirement, pool=pool, need_bytes=gib * GIB, **only).node


PREFER_N1 = TopologyRequirement(
    (node_segments("n1"), node_segments("n2")), (node_segments("n1"), node_segments("n2"))
)


async def test_the_preferred_node_is_taken_else_the_one_with_most_room():
    both = view(node("n1"), node("n2", gib=20))
    assert await chosen(both) == "n2"
    assert await chosen(both, PREFER_N1) == "n1"


async def test_a_preferred_node_without_room_is_refused_so_that_the_scheduler_chooses_again():
    with pytest.raises(ResourceExhausted, match="at most"):
        await chosen(view(node("n1", gib=1), node("n2")), PREFER_N1, gib=5)
    with pytest.raises(ResourceExhausted, match="n2 only"):
        await chosen(view(node("n2")), PREFER_N1)


async def test_a_volume_with_a_source_goes_there_whatever_is_preferred():
    assert await chosen(view(node("n1"), node("n2")), PREFER_N1, node="n2") == "n2"


async def test_a_node_that_is_full_or_not_allowed_or_silent_is_passed_over():
    assert await chosen(view(node("n1", gib=1), node("n2")), gib=5) == "n2"
    assert await chosen(view(node("n1"), node("n2")), TopologyRequirement((node_segments("n1"),))) == "n1"
    assert await chosen(view(node("n1", gib=99, silent_s=600), node("n2"))) == "n2"
    assert await chosen(view(node("n1", problem="not mounted"), node("n2"))) == "n2"
    assert await chosen(view(node("n1"), node("n2", gib=99)), node="n1") == "n1"


async def test_what_no_node_has_begun_counts_as_promised_and_what_failed_does_not():
    first = asked("a", "n1", 8)
    with pytest.raises(ResourceExhausted, match="at most"):
        await chosen(view(node("n1"), volumes=[first]), gib=3)
    assert await chosen(view(node("n1"), volumes=[{**first, "status": {"state": "Failed"}}]), gib=3) == "n1"
    assert await chosen(view(node("n1"), volumes=[asked("a", "n2", 8)]), gib=3) == "n1"


async def test_a_pool_that_nobody_has_and_a_place_that_has_none_are_told_apart():
    with pytest.raises(InvalidArgument, match="allowed: default"):
        await chosen(view(node("n1")), pool="fast")
    with pytest.raises(InvalidArgument, match="none yet"):
        await chosen(view())
    with pytest.raises(ResourceExhausted, match="n1 only"):
        await chosen(view(node("n1")), TopologyRequirement((node_segments("n9"),)))


async def test_the_default_pool_is_the_only_one_or_the_one_of_that_name():
    assert default_pool(await view(node("n1", pool="fast"), node("n2", pool="fast")).pools()) == "fast"
    assert default_pool(await view(node("n1", pool="fast"), node("n2")).pools()) == "default"
    assert default_pool(await view(node("n1", pool="fast"), node("n2", pool="slow")).pools()) is None
