from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.model import Format
from csi_vduse.storage.server import StorageServer
from tests.unit.storage.use import clients, config_in


@pytest.fixture(params=[Format.RAW, Format.QCOW2], ids=lambda one: one.value)
def image_format(request) -> Format:
    return request.param


@pytest.fixture
def config(tmp_path: Path, image_format: Format) -> ServerConfig:
    return config_in(tmp_path, "pool", image_format=image_format)


@contextlib.asynccontextmanager
async def started(config: ServerConfig) -> AsyncIterator[StorageServer]:
    server = StorageServer(config)
    async with server.running():
        yield server


@pytest.fixture
async def server(config: ServerConfig) -> AsyncIterator[StorageServer]:
    async with started(config) as running:
        yield running


@pytest.fixture(autouse=True)
def _clients_are_closed():
    yield
    while clients:
        clients.pop().close()
