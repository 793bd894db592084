"""Fixtures: a server per test, the clients, and the server's log when a test fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.vhost_user.exported import Exported

MIB = 1 << 20
IMAGE_BYTES = 64 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image.raw"
    with path.open("wb") as file:
        file.truncate(IMAGE_BYTES)
    return path


@pytest.fixture
def export(tmp_path: Path) -> Iterator[Callable[..., Exported]]:
    made: list[Exported] = []

    def start(backend: str, *options: str) -> Exported:
        folder = tmp_path / f"export{len(made)}"
        folder.mkdir()
        made.append(Exported(folder, backend, *options))
        return made[-1].start()

    yield start
    for exported in made:
        exported.kill()
        sys.stdout.write(exported.log_text()[-20000:])  # shown if the test fails
