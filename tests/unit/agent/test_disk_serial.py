"""The serial number of a volume's disk: the id where a virtio-blk serial can hold it, a digest where it cannot."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.agent import wire
from csi_vduse.agent.model import (
    Attachment,
    AttachSpec,
    State,
    attachment_from_json,
    attachment_to_json,
    disk_serial,
)
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.volumes.ids import volume_id

SPEC = AttachSpec("erp-databases-of-1999-a", FileBackend(Path("/image")), 1 << 20)


@pytest.mark.parametrize("id_", [volume_id("any"), "erp/db 1", "a", "x" * 20])
def test_an_id_that_a_serial_can_hold_is_one(id_: str) -> None:
    assert disk_serial(id_) == id_


@pytest.mark.parametrize("id_", ["größe-der-datenbank", "x" * 21, "a\nb", "ünicode", "tab\there"])
def test_an_id_that_a_serial_cannot_hold_has_a_digest(id_: str) -> None:
    assert disk_serial(id_) != id_
    assert disk_serial(id_ + "2") != disk_serial(id_)


@given(st.text(min_size=1))
def test_a_serial_comes_through_the_device_unchanged(id_: str) -> None:
    serial = disk_serial(id_)
    assert serial.encode()[:20].decode() == serial
    assert serial.isprintable()


def test_two_ids_that_begin_alike_have_two_serials() -> None:
    assert disk_serial("erp-databases-of-1999-a") != disk_serial("erp-databases-of-1999-b")


def test_a_disk_keeps_the_serial_that_it_was_attached_with() -> None:
    """Of an attachment of a release before: its worker cut the id, and so does its successor."""
    attachment = Attachment(SPEC, State.ATTACHED)
    record = attachment_to_json(attachment)
    assert attachment_from_json(record).spec.disk_serial == disk_serial(SPEC.volume_id)
    del record["serial"]
    before = attachment_from_json(record)
    assert before.spec.disk_serial == SPEC.volume_id
    assert before.spec == SPEC  # the same attachment is asked for
    assert attachment_from_json(attachment_to_json(before)).spec.disk_serial == SPEC.volume_id


def test_the_serial_comes_with_the_attachment_and_an_agent_before_has_cut_the_id() -> None:
    attachment = Attachment(replace(SPEC, serial="another"), State.ATTACHED)
    message = wire.attachment_to_wire(attachment)
    assert wire.attachment_from_wire(message).spec.disk_serial == "another"
    message.serial = ""
    assert wire.attachment_from_wire(message).spec.disk_serial == SPEC.volume_id
