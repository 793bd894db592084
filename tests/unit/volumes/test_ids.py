"""Ids: stable, of the promised form and length, never a path."""

from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.agent.model import device_name
from csi_vduse.volumes.ids import is_snapshot_id, is_volume_id, snapshot_id, volume_id

VIRTIO_BLK_SERIAL_BYTES = 20


@given(st.text())
def test_volume_id_fills_a_virtio_serial_exactly(name):
    assert len(volume_id(name).encode()) == VIRTIO_BLK_SERIAL_BYTES


@given(st.text())
def test_ids_are_recognised_and_never_mistaken_for_each_other(name):
    assert is_volume_id(volume_id(name))
    assert is_snapshot_id(snapshot_id(name))
    assert not is_snapshot_id(volume_id(name))
    assert not is_volume_id(snapshot_id(name))


@given(st.text())
def test_volume_id_is_a_device_name_as_it_is(name):
    assert device_name(volume_id(name)) == volume_id(name)


@given(st.text(), st.text())
def test_different_names_have_different_ids(one, other):
    assert (volume_id(one) == volume_id(other)) == (one == other)


def test_id_of_a_name_never_changes():
    assert volume_id("pvc-1") == "vol-f2868e1aa7cab669"


@given(st.text())
def test_only_our_form_is_an_id(text):
    assert is_volume_id(text) == (
        len(text) == VIRTIO_BLK_SERIAL_BYTES
        and text.startswith("vol-")
        and set(text[4:]) <= set("0123456789abcdef")
    )
    assert not is_volume_id(f"../{volume_id(text)}")
    assert not is_volume_id(f"{volume_id(text)}\n")
