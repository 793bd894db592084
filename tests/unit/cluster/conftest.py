"""A cluster in one process: an API server, a controller, node plugins with pools and fake agents, kubelets' part.

Everything of ours is the real thing, reached over its sockets; agents have no devices.
"""

from __future__ import annotations

import asyncio
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_vduse.agent.model import VolumeStats
from csi_vduse.config import ControllerConfig, NodeConfig, PoolConfig
from csi_vduse.kube import mirror
from csi_vduse.kube.api import ApiServer, at
from csi_vduse.kube.resources import CORE_NODES, NODES, SNAPSHOTS, VOLUMES, Object
from csi_vduse.proto import csi_pb2, csi_pb2_grpc, pluginregistration_pb2, pluginregistration_pb2_grpc
from csi_vduse.services import controller_process, node_plugin, node_status, node_work, waiting
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from tests.unit.fakes.agent import FakeAgent
from tests.unit.fakes.kubernetes_api import FakeApi, fake_api
from tests.unit.services.stack import create_request
from tests.unit.storage.use import config_in

TIMEOUT_S = 60.0


class NodeAgent(FakeAgent):
    """The fake agent, as far as a node plugin asks it."""

    async def stats(self) -> list[VolumeStats]:
        return []


class ClusterNode:
    """One node: its directories, its agent, and what kubelet does."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self.directory = directory / name
        self.pool = self.directory / "pool"
        self.pool.mkdir(parents=True)
        (self.directory / "plugins_registry").mkdir()
        self.agent = NodeAgent()
        self.http = f"127.0.0.1:{free_port()}"

    @property
    def config(self) -> NodeConfig:
        return NodeConfig(
            node_id=self.name,
            endpoint=self.directory / "csi.sock",
            registration=self.directory / "plugins_registry/reg.sock",
            state_dir=self.directory / "state",
            agent_socket=self.directory / "agent.sock",
            pools=(PoolConfig("default", "file", str(self.pool)),),
            http_address=self.http,
            startup_taint="csi.vduse.dev/not-ready",
        )

    def image(self, object_id: str) -> Path:
        part = "snapshots" if object_id.startswith("snap-") else "volumes"
        return self.pool / part / object_id / "image.raw"

    async def kubelet_registers(self) -> pluginregistration_pb2.PluginInfo:
        """Do what kubelet does when a socket appears."""
        await until(self.config.registration.exists)
        async with grpc.aio.insecure_channel(f"unix:{self.config.registration}") as channel:
            stub = pluginregistration_pb2_grpc.RegistrationStub(channel)
            info = await stub.GetInfo(
                pluginregistration_pb2.InfoRequest(), wait_for_ready=True, timeout=TIMEOUT_S
            )
            await stub.NotifyRegistrationStatus(
                pluginregistration_pb2.RegistrationStatus(plugin_registered=True), timeout=TIMEOUT_S
            )
        return info


class Cluster:
    """See the module."""

    def __init__(self, directory: Path, server: FakeApi, api: ApiServer, stack: AsyncExitStack) -> None:
        self.directory = directory
        self.server = server
        self.api = api
        self.nodes: dict[str, ClusterNode] = {}
        self.http = f"127.0.0.1:{free_port()}"
        self._stack = stack
        self._lives: dict[str, AsyncExitStack] = {}

    async def start_controller(self, pools: tuple[PoolConfig, ...] = ()) -> None:
        life = await self._stack.enter_async_context(AsyncExitStack())
        self._lives["controller"] = life
        config = ControllerConfig(
            endpoint=self.directory / "csi.sock",
            http_address=self.http,
            lease_namespace="vduse",
            identity="controller-1",
            pools=pools,
            state_dir=self.directory / "controller",
        )
        await life.enter_async_context(controller_process.serving(config, self.api))
        channel = await life.enter_async_context(grpc.aio.insecure_channel(f"unix:{config.endpoint}"))
        self.controller = csi_pb2_grpc.ControllerStub(channel)
        self.identity = csi_pb2_grpc.IdentityStub(channel)

    async def start_node(self, name: str) -> ClusterNode:
        node = self.nodes.get(name) or ClusterNode(self.directory, name)
        self.nodes[name] = node
        if self.server.object(CORE_NODES.named(name)) is None:
            taint = {"key": "csi.vduse.dev/not-ready", "effect": "NoExecute"}
            await self.server.put(
                CORE_NODES.named(name),
                {
                    "metadata": {"name": name, "uid": f"uid-{name}"},
                    "spec": {"taints": [taint, {"key": "other"}]},
                },
            )
        life = await self._stack.enter_async_context(AsyncExitStack())
        self._lives[name] = life
        await life.enter_async_context(node_plugin.serving(node.config, self.api, node.agent))
        return node

    async def stop(self, name: str) -> None:
        await self._lives.pop(name).aclose()

    async def create(self, name: str = "v", **fields: Any) -> csi_pb2.Volume:
        request = create_request(name, **fields)
        return (await self.controller.CreateVolume(request, timeout=TIMEOUT_S)).volume

    async def delete(self, volume_id: str) -> None:
        await self.controller.DeleteVolume(
            csi_pb2.DeleteVolumeRequest(volume_id=volume_id), timeout=TIMEOUT_S
        )

    async def snapshot(self, volume_id: str, name: str = "s") -> csi_pb2.Snapshot:
        request = csi_pb2.CreateSnapshotRequest(source_volume_id=volume_id, name=name)
        return (await self.controller.CreateSnapshot(request, timeout=TIMEOUT_S)).snapshot

    def volume(self, volume_id: str) -> Object:
        found = self.server.object(VOLUMES.named(volume_id))
        assert found is not None
        return found

    def leftovers(self) -> list[str]:
        """Objects and images, but for the pools' marks."""
        images = [str(path) for node in self.nodes.values() for path in node.pool.rglob("*.raw")]
        objects = self.server.objects(VOLUMES.base) + self.server.objects(SNAPSHOTS.base)
        return images + [found["metadata"]["name"] for found in objects]


async def until(condition: Callable[[], object]) -> None:
    """Wait for something that nobody announces."""
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


def known_nodes(cluster: Cluster, *names: str) -> Awaitable[None]:
    """The controller has seen the nodes' pools."""
    return until(
        lambda: (
            {found["metadata"]["name"] for found in cluster.server.objects(NODES.base) if found.get("status")}
            >= set(names)
        )
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@pytest.fixture
async def cluster(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Cluster]:
    """A controller and nobody else; tests start the nodes."""
    monkeypatch.setattr(mirror, "_FIRST_DELAY_S", 0.01)
    monkeypatch.setattr(mirror, "_MAX_DELAY_S", 0.1)
    monkeypatch.setattr(node_work, "_FIRST_DELAY_S", 0.05)
    monkeypatch.setattr(node_status, "VOLUME_PERIOD_S", 0.05)
    monkeypatch.setattr(node_plugin, "_AGENT_PERIOD_S", 0.05)
    monkeypatch.setattr(waiting, "_LOOK_AGAIN_S", 0.5)
    directory = Path(tempfile.mkdtemp(prefix="c-"))  # socket paths are short
    try:
        async with fake_api() as server, AsyncExitStack() as stack:
            api = at(server.url)
            stack.push_async_callback(api.close)
            cluster = Cluster(directory, server, api, stack)
            await cluster.start_controller()
            yield cluster
    finally:
        shutil.rmtree(directory)


@pytest.fixture
async def one_node(cluster: Cluster) -> ClusterNode:
    node = await cluster.start_node("n1")
    await until(lambda: cluster.server.object(f"/apis/csi.vduse.dev/v1alpha1/vdusenodes/{node.name}"))
    return node


@pytest.fixture
async def server(tmp_path: Path) -> AsyncIterator[StorageServer]:
    config = config_in(tmp_path, "images")
    server = StorageServer(config)
    async with server.running(), listening(config, server):
        yield server


@pytest.fixture
async def shared(cluster: Cluster, server: StorageServer, tmp_path: Path) -> Cluster:
    """Two nodes with file pools, and a storage server beside them."""
    del server
    await cluster.stop("controller")
    await cluster.start_controller(pools=(PoolConfig("remote", "nbd", f"unix:{tmp_path}/control.sock"),))
    for name in ("n1", "n2"):
        await cluster.start_node(name)
    await known_nodes(cluster, "n1", "n2")
    return cluster
