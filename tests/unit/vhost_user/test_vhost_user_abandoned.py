"""Requests that a ring had to abandon cannot reach the front-end's memory when it is told that the ring has stopped."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.engine import Engine, QueueAddress, Region
from csi_vduse.dataplane.vhost_user.protocol import Request
from tests.unit.vhost_user.sessions import SPEC, reads_a_sector, serving
from tests.vhost_user.frontend import (
    GUEST,
    MEMORY_BYTES,
    PROTOCOL_FEATURES,
    SIZE,
    USER,
    Frontend,
    number,
    region,
    state,
)


class HangingEngine(Engine):
    """Whatever stops has abandoned something; notes what comes before and after."""

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self.story: list[str] = []

    def start_queue(self, index: int, address: QueueAddress) -> None:
        super().start_queue(index, address)
        self.story.append("started")

    def stop_queue(self, index: int, timeout_s: float) -> bool:
        assert super().stop_queue(index, timeout_s)
        self.story.append("abandoned")
        return False

    def set_regions(self, regions: Sequence[Region]) -> None:
        super().set_regions(regions)
        self.story.append(f"map of {len(regions)}")


@pytest.fixture
def hanging(tmp_path: Path) -> Iterator[tuple[Frontend, list[str]]]:
    """A front-end with a ring that was served once; the story of its engine from then on."""
    made: list[HangingEngine] = []

    def make(**how: Any) -> Engine:
        made.append(HangingEngine(**how))
        return made[0]

    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SPEC.capacity_bytes)
    with serving(FileBackend(image), make) as running:
        running.frontend.start()
        assert reads_a_sector(running.frontend)
        made[0].story.clear()
        yield running.frontend, made[0].story


def test_get_vring_base_is_answered_when_the_memory_was_taken_away(
    hanging: tuple[Frontend, list[str]],
) -> None:
    frontend, story = hanging
    assert frontend.ask(Request.GET_VRING_BASE, state(0, 0)) == state(0, 1)
    assert story == ["abandoned", "map of 1"]


def test_a_reset_is_answered_when_the_memory_was_taken_away(hanging: tuple[Frontend, list[str]]) -> None:
    frontend, story = hanging
    frontend.send(Request.SET_PROTOCOL_FEATURES, number(PROTOCOL_FEATURES | 1 << 13))
    assert frontend.acked(Request.RESET_DEVICE)
    assert story == ["abandoned", "map of 1"]


@pytest.mark.parametrize(
    "request_name", ["SET_VRING_NUM", "SET_VRING_BASE", "SET_VRING_ADDR", "SET_VRING_KICK"]
)
def test_a_ring_that_is_changed_starts_when_the_memory_was_taken_from_what_it_was(
    hanging: tuple[Frontend, list[str]], request_name: str
) -> None:
    frontend, story = hanging
    elsewhere = struct.pack("=IIQQQQ", 0, 0, USER, USER + 0x2000, USER + 0x3000, 0)
    payload, fds = {
        "SET_VRING_NUM": (state(0, SIZE), ()),
        "SET_VRING_BASE": (state(0, 1), ()),
        "SET_VRING_ADDR": (elsewhere, ()),
        "SET_VRING_KICK": (number(0), (frontend.kick,)),
    }[request_name]
    assert frontend.acked(Request[request_name], payload, fds)
    assert story == ["abandoned", "map of 1", "started"]


def test_a_ring_that_lost_its_memory_is_kept_out_of_what_is_left(hanging: tuple[Frontend, list[str]]) -> None:
    frontend, story = hanging
    far = bytes(8) + region(GUEST + (1 << 40), MEMORY_BYTES, USER + (1 << 40))
    assert frontend.acked(Request.ADD_MEM_REG, far, (frontend.memory_fd,))
    assert frontend.acked(Request.REM_MEM_REG, bytes(8) + region(GUEST, MEMORY_BYTES, USER))
    assert story == ["map of 2", "map of 1", "abandoned", "map of 1"]


def test_a_ring_goes_on_when_another_one_has_abandoned_something(hanging: tuple[Frontend, list[str]]) -> None:
    frontend, story = hanging
    frontend.give_ring(index=1, base=1)  # in the same place: it finds nothing to do
    frontend.enable(index=1)
    frontend.ask(Request.GET_VRING_BASE, state(1, 0))
    assert story == ["started", "abandoned", "map of 1"]
    assert reads_a_sector(frontend)
