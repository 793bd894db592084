"""Volumes that the node's registry does not know: described by the request, decided by their content."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.agent.model import disk_serial
from csi_vduse.backends.nbd import data_path
from csi_vduse.dataplane.backend_spec import BackendSpec, NbdBackend
from csi_vduse.errors import (
    AlreadyExists,
    CommandFailed,
    FailedPrecondition,
    NotFound,
    OutOfRange,
    ProtocolError,
    Unavailable,
)
from csi_vduse.node.context import get_volume
from csi_vduse.node.expand import expand
from csi_vduse.node.foreign import Export, ForeignVolumes
from csi_vduse.node.publish import PublishRequest, publish
from csi_vduse.node.stage import StageRequest, stage
from csi_vduse.node.stats import volume_health
from csi_vduse.node.unpublish import unpublish
from csi_vduse.node.unstage import unstage
from csi_vduse.storage.server import StorageServer
from csi_vduse.volumes.blocking import BlockingPool
from csi_vduse.volumes.model import FilesystemRecord, FilesystemState, Volume
from csi_vduse.volumes.policy import Use
from csi_vduse.volumes.sizes import CapacityRange
from tests.unit.node.conftest import MIB, LoopNode, use
from tests.unit.storage.nbd_client import NbdClient, Refused
from tests.unit.storage.use import config_in

ID = "erp/db 1"  # a volume handle need not look like one of our ids
SIZE = 64 * MIB
# What the server is made to say beside what it says itself.
SAID: dict[str, Any] = {"min_block_bytes": 1, "multi_conn": True}


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[StorageServer]:
    server = StorageServer(config_in(tmp_path, "pool"))
    async with server.running():
        yield server


@pytest.fixture
async def node(loop_node: LoopNode, server: StorageServer, tmp_path: Path) -> AsyncIterator[LoopNode]:
    """A node whose double serves the server's image v1 for any export that answers."""
    threads = BlockingPool("test", 2)

    async def ask(spec: BackendSpec) -> Export:
        try:
            client = NbdClient(spec.uri)  # type: ignore[union-attr]
        except Refused as error:
            raise Unavailable(str(error)) from error
        client.close()
        return Export(client.size_bytes, read_only=client.read_only, **SAID)

    await server.create("v1", SIZE)
    loop_node.agent.nbd_pool = tmp_path / "pool"
    loop_node.agent.nbd_image = "v1"
    foreign = ForeignVolumes(tmp_path / "foreign", ask, threads)

    async def path(volume: Volume, context: Mapping[str, str]) -> NbdBackend:
        return data_path(volume.id, context)

    loop_node.node = replace(loop_node.node, foreign=foreign, data_path=path)
    yield loop_node
    threads.close()


async def told(server: StorageServer, node_id: str = "node-1") -> dict[str, str]:
    published = await server.publish("v1", node_id, read_only=False, shared=False)
    return {"uri": published.uri, "epoch": str(published.epoch)}


def staging(node: LoopNode) -> str:
    return str(node.directory / "staging")


async def put(node: LoopNode, context: dict[str, str], how: Use | None = None) -> Path:
    await stage(node.node, StageRequest(ID, staging(node), how or use("ext4"), context))
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


def mkfs_that_dies_half_way(tools: Path) -> None:
    tools.mkdir()
    (tools / "mkfs.ext4").write_text(
        '#!/bin/sh\nfor device; do :; done\necho half | dd of="$device" bs=4096 seek=1 conv=notrunc status=none\nexit 7\n'
    )
    (tools / "mkfs.ext4").chmod(0o755)


async def interrupted(node: LoopNode, context: dict[str, str], patch: pytest.MonkeyPatch) -> None:
    """Stage so that mkfs ends after it has written something."""
    mkfs_that_dies_half_way(node.directory / "bin")
    with patch.context() as here:
        here.setenv("PATH", str(node.directory / "bin"), prepend=":")
        with pytest.raises(CommandFailed):
            await put(node, context)


async def test_an_interrupted_format_is_begun_again_within_its_epoch(
    node: LoopNode, server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = await told(server)
    await interrupted(node, context, monkeypatch)
    path = await put(node, context)
    (path / "f").write_bytes(b"data")
    await unstage(node.node, ID, staging(node))


async def test_an_interrupted_format_of_another_epoch_is_for_a_person(
    node: LoopNode, server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody else may have had the volume in between."""
    await interrupted(node, await told(server), monkeypatch)
    await server.unpublish("v1")
    with pytest.raises(FailedPrecondition, match="interrupted mkfs can have written it, zero it"):
        await put(node, await told(server))


async def test_an_interrupted_format_that_nobody_fences_is_for_a_person(
    node: LoopNode, server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = {"uri": (await told(server))["uri"]}
    await interrupted(node, context, monkeypatch)
    with pytest.raises(FailedPrecondition, match="interrupted mkfs can have written it, zero it"):
        await put(node, context)


async def test_raw_use_ends_a_begun_format_within_its_epoch_too(
    node: LoopNode, server: StorageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = await told(server)
    await interrupted(node, context, monkeypatch)
    await stage(node.node, StageRequest(ID, staging(node), use(None), context))
    await node.agent.detach(ID)  # its unstage would forget it
    with pytest.raises(FailedPrecondition, match="no known format"):
        await put(node, context)


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


async def test_a_server_that_says_nothing_while_it_serves_is_asked_at_the_next_stage(
    node: LoopNode, server: StorageServer
) -> None:
    """One that allows a single connection, which the volume has."""
    path = await put(node, await told(server), use(None))
    real = node.node

    async def refuses(_: BackendSpec) -> Export:
        raise ProtocolError("the server hangs up")

    assert real.foreign is not None
    node.node = replace(real, foreign=replace(real.foreign, ask=refuses))
    with pytest.raises(Unavailable, match=r"hangs up.*stage it again"):
        await expand(node.node, ID, str(path), CapacityRange(2 * SIZE))
    node.node = real
    await unstage(node.node, ID, staging(node))


async def test_attributes_describe_the_device(node: LoopNode, server: StorageServer) -> None:
    context = {**await told(server), "queues": "2", "blockSize": "4096", "backend": "nbd", "pool": "there"}
    await put(node, context)
    spec = node.agent.attachments[ID].spec
    assert (spec.queues, spec.block_size_bytes) == (2, 4096)
    await unstage(node.node, ID, staging(node))


@pytest.mark.parametrize(
    ("said", "context", "queues", "block_bytes"),
    [
        ({"multi_conn": False}, {}, 1, 512),
        ({"multi_conn": True}, {}, 0, 512),
        ({"multi_conn": False}, {"queues": "2"}, 2, 512),
        ({"min_block_bytes": 4096}, {}, 0, 4096),
        ({"min_block_bytes": 4096}, {"blockSize": "512"}, 0, 512),
        ({"min_block_bytes": 65536}, {}, 0, 512),
    ],
)
async def test_what_attributes_do_not_say_the_server_says(
    node: LoopNode,
    server: StorageServer,
    monkeypatch: pytest.MonkeyPatch,
    said: dict[str, Any],
    context: dict[str, str],
    queues: int,
    block_bytes: int,
) -> None:
    for key, value in said.items():
        monkeypatch.setitem(SAID, key, value)
    await put(node, {**await told(server), **context}, use(None))
    spec = node.agent.attachments[ID].spec
    assert (spec.queues, spec.block_size_bytes) == (queues, block_bytes)
    await unstage(node.node, ID, staging(node))


async def test_an_export_that_the_server_has_read_only_is_used_read_only(
    node: LoopNode, server: StorageServer
) -> None:
    """A PersistentVolume says nothing of it: its access mode is one that may write."""
    path = await put(node, await told(server))
    (path / "f").write_text("x")
    await unstage(node.node, ID, staging(node))
    await server.unpublish("v1")
    published = await server.publish("v1", "node-1", read_only=True, shared=False)
    for _ in range(2):
        path = await put(node, {"uri": published.uri})
    assert (path / "f").read_text() == "x"
    with pytest.raises(OSError, match="Read-only"):
        (path / "g").write_text("x")
    target = node.target("pod")
    for _ in range(2):
        await publish(node.node, PublishRequest(ID, str(path), target, use("ext4"), read_only=False))
    assert await volume_health(node.node, ID) == ()
    await unpublish(node.node, ID, target)
    await unstage(node.node, ID, staging(node))


async def test_an_export_that_grew_at_its_server_grows_where_it_is_used(
    node: LoopNode, server: StorageServer
) -> None:
    context = await told(server)
    path = await put(node, context, use(None))
    await server.expand("v1", 2 * SIZE)
    assert await expand(node.node, ID, str(path), CapacityRange(2 * SIZE)) == 2 * SIZE
    assert node.agent.attachments[ID].spec.capacity_bytes == 2 * SIZE
    assert (await get_volume(node.node, ID)).capacity_bytes == 2 * SIZE
    await put(node, context, use(None))
    await unstage(node.node, ID, staging(node))


async def test_an_export_that_did_not_grow_is_grown_at_its_server_first(
    node: LoopNode, server: StorageServer
) -> None:
    path = await put(node, await told(server), use(None))
    with pytest.raises(OutOfRange, match="grow the export at its server"):
        await expand(node.node, ID, str(path), CapacityRange(2 * SIZE))
    await unstage(node.node, ID, staging(node))


@pytest.mark.parametrize("id_", ["größe-der-datenbank", "erp-databases-of-1999-a"])
async def test_a_volume_of_whatever_handle_is_proved_to_be_the_disk(
    node: LoopNode, server: StorageServer, id_: str
) -> None:
    context = await told(server)
    await stage(node.node, StageRequest(id_, staging(node), use("ext4"), context))
    attachment = node.agent.attachments[id_]
    # A disk of an attachment of a release before has the id, cut, for its serial.
    node.agent.attachments[id_] = replace(attachment, spec=replace(attachment.spec, serial=id_))
    await unstage(node.node, id_, staging(node))
    node.agent.wrong_serial = disk_serial(id_ + "another that begins alike")
    with pytest.raises(FailedPrecondition, match="is not what volume"):
        await stage(node.node, StageRequest(id_, staging(node), use("ext4"), context))


async def test_without_an_export_there_is_no_volume(node: LoopNode) -> None:
    with pytest.raises(NotFound):
        await put(node, {})


async def test_a_volume_of_a_pool_that_was_not_published_is_refused(node: LoopNode) -> None:
    volume = await node.create()
    with pytest.raises(FailedPrecondition, match="was not published"):
        await stage(node.node, StageRequest(volume.id, staging(node), use("ext4"), {}))
