"""A storage server that serves workers of its machine by vhost-user sockets."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.backends.qsd import parse_location
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.dataplane.vhost_user.offer import Offer
from csi_vduse.errors import FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.storage.config import ServerConfig
from csi_vduse.storage.model import Format
from csi_vduse.storage.server import StorageServer
from tests.unit.storage.conftest import started
from tests.unit.storage.use import MIB, SIZE, publish


@pytest.fixture
def image_format() -> Format:
    return Format.RAW


@pytest.fixture
def config(config: ServerConfig, tmp_path_factory: pytest.TempPathFactory) -> ServerConfig:
    return replace(config, vhost_user=tmp_path_factory.mktemp("d"))  # whose path has to be short


def disk_of(uri: str) -> Path:
    return Path(uri.removeprefix("vhost-user:"))


async def asked(uri: str) -> Offer:
    return await asyncio.to_thread(frontend.probe, disk_of(uri))


async def is_gone(uri: str) -> bool:
    try:
        await asked(uri)
    except VduseError:
        return True
    return False


async def test_each_publication_has_a_socket_of_its_own(server: StorageServer):
    await server.create("v1", SIZE)
    first = await publish(server)
    assert not first.renewable
    assert (await asked(first.uri)).capacity_bytes == SIZE
    assert not (await asked(first.uri)).is_read_only
    await server.unpublish("v1", "a")
    assert await is_gone(first.uri)
    second = await publish(server, read_only=True)
    assert second.uri != first.uri
    assert (await asked(second.uri)).is_read_only


async def test_a_volume_grows_behind_its_socket(server: StorageServer):
    await server.create("v1", SIZE)
    published = await publish(server)
    await server.expand("v1", SIZE + MIB)
    assert (await asked(published.uri)).capacity_bytes == SIZE + MIB


async def test_a_client_that_stays_is_cut_off(server: StorageServer):
    await server.create("v1", SIZE)
    published = await publish(server)
    sock = await asyncio.to_thread(frontend.connect, disk_of(published.uri))
    with sock:
        sock.settimeout(30)
        await server.unpublish("v1", "a")
        assert await asyncio.to_thread(sock.recv, 1) == b""


async def test_a_daemon_that_is_killed_is_followed_by_one_with_the_same_sockets(server: StorageServer):
    await server.create("v1", SIZE)
    published = await publish(server)
    pid = server.daemon_pid
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(30):
        while server.daemon_pid in {0, pid} or await is_gone(published.uri):
            await asyncio.sleep(0.05)
    assert (await asked(published.uri)).capacity_bytes == SIZE


async def test_a_server_that_comes_back_serves_them_again(config: ServerConfig):
    async with started(config) as server:
        await server.create("v1", SIZE)
        published = await publish(server)
    async with started(config):
        assert (await asked(published.uri)).capacity_bytes == SIZE


async def test_a_qcow2_image_that_was_made_otherwise_is_refused(config: ServerConfig):
    """What a killed daemon forgets of it nobody would make stable."""
    async with started(replace(config, vhost_user=None, image_format=Format.QCOW2)) as server:
        await server.create("v1", SIZE)
    async with started(config) as server:
        with pytest.raises(FailedPrecondition, match="qcow2"):
            await publish(server)


def test_only_raw_images_are_served_so(config: ServerConfig):
    """And only where a socket's path has room."""
    with pytest.raises(InvalidArgument, match="too long"):
        replace(config, vhost_user=Path("/run") / ("x" * 60))
    with pytest.raises(InvalidArgument, match="raw"):
        replace(config, image_format=Format.QCOW2)


def test_a_pool_of_this_kind_is_on_this_machine():
    parse_location("unix:/run/control.sock")
    with pytest.raises(InvalidArgument, match="another machine"):
        parse_location("192.0.2.1?tls=/keys")
