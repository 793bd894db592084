"""Volumes that the node's registry does not know: described by the request, decided by their content."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.backends.nbd import data_path
from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.errors import AlreadyExists, FailedPrecondition, NotFound, Unavailable
from csi_vduse.node.context import get_volume
from csi_vduse.node.foreign import ForeignVolumes
from csi_vduse.node.stage import StageRequest, stage
from csi_vduse.node.unstage import unstage
from csi_vduse.storage.config import Address, ServerConfig
from csi_vduse.storage.server import StorageServer
from csi_vduse.volumes.blocking import BlockingPool
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState
from tests.unit.node.conftest import MIB, LoopNode, use
from tests.unit.storage.nbd_client import NbdClient, Refused

ID = "erp/db 1"  # a volume handle need not look like one of our ids
SIZE = 64 * MIB


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[StorageServer]:
    (tmp_path / "pool").mkdir()
    server = StorageServer(
        ServerConfig(
            directory=tmp_path / "pool",
            run_dir=tmp_path / "run",
            control=Address(path=tmp_path / "control.sock"),
            nbd=Address(path=tmp_path / "nbd.sock"),
        )
    )
    async with server.running():
        yield server


@pytest.fixture
async def node(loop_node: LoopNode, server: StorageServer, tmp_path: Path) -> AsyncIterator[LoopNode]:
    """A node whose double serves the server's image v1 for any export that answers."""
    threads = BlockingPool("test", 2)

    async def size_of(spec: BackendSpec) -> int:
        try:
            client = NbdClient(spec.uri)  # type: ignore[union-attr]
        except Refused as error:
            raise Unavailable(str(error)) from error
        client.close()
        return client.size_bytes

    await server.create("v1", SIZE)
    loop_node.agent.nbd_pool = tmp_path / "pool"
    loop_node.agent.nbd_image = "v1"
    foreign = ForeignVolumes(tmp_path / "foreign", size_of, threads)
    loop_node.node = replace(
        loop_node.node, foreign=foreign, data_path=lambda volume, context: data_path(volume.id, context)
    )
    yield loop_node
    threads.close()


async def told(server: StorageServer, node_id: str = "node-1") -> dict[str, str]:
    published = await server.publish("v1", node_id, read_only=False, shared=False)
    return {"uri": published.uri, "epoch": str(published.publication.epoch)}


def staging(node: LoopNode) -> str:
    return str(node.directory / "staging")


async def put(node: LoopNode, context: dict[str, str]) -> Path:
    await stage(node.node, StageRequest(ID, staging(node), use("ext4"), context))
    return Path(staging(node))


async def test_it_is_formatted_once_and_its_data_is_there_again(
    node: LoopNode, server: StorageServer
) -> None:
    context = await told(server)
    path = await put(node, context)
    (path / "f").write_bytes(b"data" * 1000)
    assert (await get_volume(node.node, ID)).capacity_bytes == SIZE
    await put(node, context)
    await unstage(node.node, ID, staging(node))
    with pytest.raises(NotFound):
        await get_volume(node.node, ID)
    assert ((await put(node, context)) / "f").read_bytes() == b"data" * 1000
    await unstage(node.node, ID, staging(node))
    assert not list((node.directory / "foreign").iterdir())


async def test_a_format_that_this_node_began_long_ago_wipes_nothing(
    node: LoopNode, server: StorageServer
) -> None:
    """Another node has used the volume since: the old record is not believed."""
    context = await told(server)
    path = await put(node, context)
    (path / "f").write_bytes(b"data")
    assert node.node.foreign is not None
    begun = FilesystemRecord("ext4", FilesystemState.FORMATTING)
    await node.node.foreign.update(ID, lambda volume: replace(volume, filesystem=begun))
    await put(node, context)
    assert (path / "f").read_bytes() == b"data"
    await unstage(node.node, ID, staging(node))
    assert ((await put(node, context)) / "f").read_bytes() == b"data"
    await unstage(node.node, ID, staging(node))


async def test_a_node_that_comes_back_is_told_that_it_was_published_anew(
    node: LoopNode, server: StorageServer
) -> None:
    old = await told(server)
    await put(node, old)
    await server.unpublish("v1")
    new = await told(server)
    with pytest.raises(AlreadyExists, match="published anew"):
        await put(node, new)
    await unstage(node.node, ID, staging(node))
    with pytest.raises(Unavailable):
        await put(node, old)
    await put(node, new)
    await unstage(node.node, ID, staging(node))


async def test_attributes_describe_the_device(node: LoopNode, server: StorageServer) -> None:
    context = {**await told(server), "queues": "2", "blockSize": "4096", "backend": "nbd", "pool": "there"}
    await put(node, context)
    spec = node.agent.attachments[ID].spec
    assert (spec.queues, spec.block_size_bytes) == (2, 4096)
    await unstage(node.node, ID, staging(node))


async def test_without_an_export_there_is_no_volume(node: LoopNode) -> None:
    with pytest.raises(NotFound):
        await put(node, {})


async def test_a_volume_of_a_pool_that_was_not_published_is_refused(node: LoopNode) -> None:
    volume = await node.create()
    with pytest.raises(FailedPrecondition, match="was not published"):
        await stage(node.node, StageRequest(volume.id, staging(node), use("ext4"), {}))
