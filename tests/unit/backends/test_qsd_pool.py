"""Pools of kind qsd: a storage server of this node, with vhost-user sockets (csi_vduse/backends/qsd.py)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.backends.qsd import QsdPool, parse_location
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.errors import FailedPrecondition
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from csi_vduse.volumes.model import Volume
from tests.unit.backends.builders import MIB, a_volume
from tests.unit.storage.use import config_in


@pytest.fixture
def config(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    # Its path has to be short.
    return config_in(tmp_path, "images", vhost_user=tmp_path_factory.mktemp("d"))


@asynccontextmanager
async def pool_of(config: ServerConfig, tmp_path: Path) -> AsyncIterator[QsdPool]:
    server = StorageServer(config)
    pool = QsdPool("fast", parse_location(str(config.control)), memory=tmp_path / "memory.json")
    async with server.running(), listening(config, server):
        yield pool
    pool.close()


async def disk_of(pool: QsdPool, volume: Volume) -> Path:
    backend = await pool.data_path(volume, {})
    assert isinstance(backend, VhostUserBackend)
    return backend.socket


async def test_a_volume_has_its_socket_until_it_is_deleted(config: ServerConfig, tmp_path: Path):
    volume = a_volume()
    async with pool_of(config, tmp_path) as pool:
        await pool.create(volume)
        socket = await disk_of(pool, volume)
        assert await disk_of(pool, volume) == socket
        assert (await asyncio.to_thread(frontend.probe, socket)).capacity_bytes == volume.capacity_bytes
        # It is in nobody's way: no controller published it, and it can grow.
        assert not await pool.published()
        assert not await pool.nodes_of(volume.id)
        await pool.expand(volume, 8 * MIB)
        assert (await asyncio.to_thread(frontend.probe, socket)).capacity_bytes == 8 * MIB
        for _ in range(2):
            await pool.delete_volume(volume.id)
        assert not socket.exists()
        assert not await pool.has_volume(volume.id)


async def test_a_server_that_serves_over_nbd_is_refused(config: ServerConfig, tmp_path: Path):
    volume = a_volume()
    async with pool_of(replace(config, vhost_user=None), tmp_path) as pool:
        await pool.create(volume)
        with pytest.raises(FailedPrecondition, match="serves over nbd"):
            await disk_of(pool, volume)
        assert not await pool._client.publications(volume.id)
