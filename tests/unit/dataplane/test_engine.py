"""The engine says why a backend cannot be opened, and lets one writer at an image."""

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import BackendSpec, FileBackend, NullBackend
from csi_vduse.dataplane.engine import OPERATIONS, Engine, inflight_bytes, init_inflight
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable, VduseError

SIZE = 1 << 20


@contextmanager
def engine(backend: BackendSpec, *, read_only: bool = False, capacity_bytes: int = SIZE) -> Iterator[Engine]:
    event_fd = os.eventfd(0)
    try:
        made = Engine(
            backend=backend,
            capacity_bytes=capacity_bytes,
            block_size_bytes=512,
            max_queues=2,
            read_only=read_only,
            serial="vol-0123456789abcdef",
            event_fd=event_fd,
        )
        try:
            yield made
        finally:
            made.close()
    finally:
        os.close(event_fd)


@pytest.fixture
def image(tmp_path: Path) -> FileBackend:
    path = tmp_path / "image"
    path.touch()
    os.truncate(path, SIZE)
    return FileBackend(path)


def test_missing_image_is_not_found(tmp_path):
    with pytest.raises(NotFound, match="nothing"), engine(FileBackend(tmp_path / "nothing")):
        pass


def test_folder_is_not_an_image(tmp_path):
    with pytest.raises(InvalidArgument), engine(FileBackend(tmp_path), read_only=True):
        pass


def test_image_cut_short_is_refused(image):
    with pytest.raises(FailedPrecondition, match="smaller"), engine(image, capacity_bytes=2 * SIZE):
        pass


def test_image_has_one_writer_at_a_time(image):
    with engine(image), pytest.raises(Unavailable, match="in use"), engine(image):
        pass
    with engine(image):
        pass


def test_image_may_have_several_readers(image):
    with engine(image, read_only=True), engine(image, read_only=True):
        pass


def test_capacity_follows_the_image_and_never_runs_ahead(image):
    with engine(image) as made:
        with pytest.raises(FailedPrecondition):
            made.set_capacity(2 * SIZE)
        os.truncate(image.path, 2 * SIZE)
        made.set_capacity(2 * SIZE)
        assert made.backend_capacity_bytes == 2 * SIZE


def test_counters_start_at_zero_and_have_a_row_for_each_operation():
    with engine(NullBackend()) as made:
        stats = made.stats()
        assert [row["operation"] for row in stats["operations"]] == list(OPERATIONS)
        assert all(row["count"] == 0 and row["latency"] == [] for row in stats["operations"])
        assert made.failure() is None
        assert made.faults() == {}


@pytest.mark.parametrize("packed", [False, True])
def test_in_flight_log_has_to_be_large_enough(packed):
    size = inflight_bytes(256, packed=packed)
    assert size % 64 == 0
    with mmap.mmap(-1, size) as log:
        init_inflight(log, 256, packed=packed)
        with pytest.raises(VduseError):
            init_inflight(log, 1024, packed=packed)


def test_limits_can_be_set_without_a_queue_and_count_nothing():
    with engine(NullBackend()) as made:
        made.set_throttle(Throttle(100, 1 << 20, 3600))
        made.set_throttle(Throttle())
        assert (made.stats()["throttled"], made.stats()["throttled_s"]) == (0, 0)
