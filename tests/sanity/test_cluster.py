"""csi-sanity against the parts of a cluster: a controller and a node plugin that share only the API server.

As test_native.py, but what is made goes through custom resources and is done by the node. The API server is
the tests' double; the rest is the real thing over its sockets.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse import log
from csi_vduse.agent.model import VolumeStats
from csi_vduse.config import ControllerConfig, NodeConfig, PoolConfig
from csi_vduse.kube.api import at
from csi_vduse.kube.resources import CORE_NODES, SNAPSHOTS, VOLUMES
from csi_vduse.node.mounts import read_mounts
from csi_vduse.services import controller_process, node_plugin
from csi_vduse.services.node import Node
from tests.sanity import csi_sanity
from tests.sanity.test_native import SanityAgent, _run
from tests.unit.cluster.conftest import free_port, until
from tests.unit.fakes.kubernetes_api import fake_api
from tests.unit.node.loop_agent import loop_works


class ClusterAgent(SanityAgent):
    """The agent as the node plugin asks it."""

    async def stats(self) -> list[VolumeStats]:
        return []


@pytest.mark.skipif(not loop_works(), reason="loop devices and mounts need root")
@pytest.mark.parametrize("access_type", ["mount", "block"])
async def test_csi_sanity_passes_through_custom_resources(tmp_path: Path, access_type: str) -> None:
    csi_sanity.build()
    log.configure(level="ERROR", component="sanity")
    (tmp_path / "pool").mkdir()
    agent = ClusterAgent(tmp_path)
    node = NodeConfig(
        node_id="sanity",
        endpoint=tmp_path / "node.sock",
        registration=tmp_path / "reg.sock",
        state_dir=tmp_path / "state",
        agent_socket=tmp_path / "agent.sock",
        pools=(PoolConfig("default", "file", str(tmp_path / "pool")),),
        http_address=f"127.0.0.1:{free_port()}",
    )
    controller = ControllerConfig(
        endpoint=tmp_path / "csi.sock",
        http_address=f"127.0.0.1:{free_port()}",
        lease_namespace="vduse",
        identity="sanity",
    )
    async with fake_api() as server:
        await server.put(
            CORE_NODES.named(node.node_id), {"metadata": {"name": node.node_id, "uid": "u"}, "spec": {}}
        )
        api = at(server.url)
        async with (
            controller_process.serving(controller, api) as mirrors,
            node_plugin.serving(node, api, agent, lambda context: Node(replace(context, sysfs=agent.sysfs))),
        ):
            await until(lambda: mirrors.nodes.all() and mirrors.nodes.all()[0].get("status"))
            argv = csi_sanity.command(node.endpoint, tmp_path, access_type)
            output = await _run([*argv, f"--csi.controllerendpoint=unix://{controller.endpoint}"])
        await api.close()
        csi_sanity.read_report(tmp_path, output).require_success()
        assert server.objects(VOLUMES.base) == []
        assert server.objects(SNAPSHOTS.base) == []
    assert not agent.attachments
    assert not [mount for mount in read_mounts() if mount.mount_point.startswith(str(tmp_path))]
    assert not list((tmp_path / "pool").glob("*/*"))
