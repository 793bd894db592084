"""A session over a file, and its front-end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import FileBackend
from tests.unit.vhost_user.sessions import SPEC, Running, serving
from tests.vhost_user.frontend import Frontend


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, SPEC.capacity_bytes)
    with serving(FileBackend(image)) as made:
        yield made


@pytest.fixture
def frontend(running: Running) -> Frontend:
    return running.frontend
