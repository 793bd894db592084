"""Pages: every entry once, whatever the page length, and no surprise when the list changes meanwhile."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.errors import InvalidArgument, Pending
from csi_vduse.proto import csi_pb2
from csi_vduse.services.paging import page
from tests.unit.backends.builders import a_volume

volumes = st.lists(
    st.tuples(st.text(min_size=1), st.integers(min_value=0, max_value=5)), unique_by=lambda pair: pair[0]
).map(lambda pairs: [a_volume(name, created_at_ns=created) for name, created in pairs])


def read_all(entries, length):
    found, token = [], ""
    while True:
        part, token = page(entries, max_entries=length, starting_token=token)
        assert length == 0 or len(part) <= length
        found += part
        if not token:
            return found


@given(volumes, st.integers(min_value=0, max_value=7))
def test_pages_together_are_the_whole_list_in_order(entries, length):
    assert read_all(entries, length) == sorted(entries, key=lambda entry: (entry.created_at_ns, entry.id))


@given(volumes, st.integers(min_value=1, max_value=7))
def test_the_entry_of_a_token_may_vanish_and_new_ones_are_seen(entries, length):
    first, token = page(entries, max_entries=length, starting_token="")
    if not token:
        return
    new = a_volume("\N{SNOWMAN} new", created_at_ns=9)
    rest, _ = page([*(one for one in entries if one not in first), new], max_entries=0, starting_token=token)
    assert {one.id for one in rest} == {one.id for one in entries} - {one.id for one in first} | {new.id}


@pytest.mark.parametrize(
    "token", ["nonsense", "1", "-1.vol-0000000000000000", "1.vol-000000000000000g", "9" * 999]
)
def test_a_token_that_is_not_ours_is_aborted(token):
    with pytest.raises(Pending) as caught:
        page([], max_entries=1, starting_token=token)
    assert caught.value.grpc_code == "ABORTED"


async def test_volumes_are_listed_in_pages(stack):
    names = [f"v{number}" for number in range(5)]
    made = [await stack.create(name) for name in names]
    found, token = [], ""
    for _ in range(3):
        request = csi_pb2.ListVolumesRequest(max_entries=2, starting_token=token)
        answer = await stack.controller.ListVolumes(request, None)
        found += [entry.volume for entry in answer.entries]
        token = answer.next_token
    assert found == made
    assert token == ""
    with pytest.raises(InvalidArgument, match="max_entries is -1"):
        await stack.controller.ListVolumes(csi_pb2.ListVolumesRequest(max_entries=-1), None)
    with pytest.raises(Pending):
        await stack.controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(starting_token="x"), None)


async def test_snapshots_are_listed_in_pages(stack):
    volume = await stack.create()
    made = [await stack.snapshot(volume.volume_id, f"s{number}") for number in range(3)]
    request = csi_pb2.ListSnapshotsRequest(max_entries=2)
    first = await stack.controller.ListSnapshots(request, None)
    second = await stack.controller.ListSnapshots(
        csi_pb2.ListSnapshotsRequest(max_entries=2, starting_token=first.next_token), None
    )
    assert [entry.snapshot for entry in (*first.entries, *second.entries)] == made


async def test_many_creates_at_once_are_all_listed(stack):
    made = await asyncio.gather(*(stack.create(f"v{number}") for number in range(20)))
    answer = await stack.controller.ListVolumes(csi_pb2.ListVolumesRequest(), None)
    assert {entry.volume.volume_id for entry in answer.entries} == {volume.volume_id for volume in made}
