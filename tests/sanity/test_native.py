"""csi-sanity against the standalone services on this machine: real images, disks and mounts, no VDUSE.

The agent is a double whose devices are loop devices (tests/unit/node/loop_agent.py); everything above it is
the real thing. The same suite runs against real VDUSE devices in tests/vm/test_sanity.py.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from csi_vduse import log
from csi_vduse.agent.model import Probe
from csi_vduse.config import AgentConfig, PoolConfig, StandaloneConfig
from csi_vduse.node.mounts import read_mounts
from csi_vduse.services.node import Node
from csi_vduse.services.standalone import serving
from csi_vduse.storage.config import Address, ServerConfig
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from tests.sanity import csi_sanity
from tests.unit.node.loop_agent import LoopAgent, loop_works, losetup

TIMEOUT_S = 900


@dataclass
class SanityAgent(LoopAgent):
    """Loop devices for attach; a hold does nothing, since nothing writes while csi-sanity copies."""

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        self._called("quiesce")
        assert hold_s > 0

    async def resume(self, volume_id: str) -> None:
        self._called("resume")

    async def probe(self) -> Probe:
        return Probe("sanity", ready=True, problems=(), max_volumes=8)


@pytest.mark.skipif(not loop_works(), reason="loop devices and mounts need root")
@pytest.mark.parametrize("access_type", ["mount", "block"])
async def test_csi_sanity_passes_with_every_advertised_capability(tmp_path: Path, access_type: str) -> None:
    csi_sanity.build()
    log.configure(level="ERROR", component="sanity")
    (tmp_path / "pool").mkdir()
    agent = SanityAgent(tmp_path)
    await _passes(tmp_path, agent, PoolConfig("default", "file", str(tmp_path / "pool")), access_type)


@pytest.mark.skipif(not loop_works(), reason="loop devices and mounts need root")
@pytest.mark.parametrize("access_type", ["mount", "block"])
async def test_csi_sanity_passes_with_a_storage_server(tmp_path: Path, access_type: str) -> None:
    """Everything of the control side is real; the double serves what the export that it is given stands for."""
    csi_sanity.build()
    log.configure(level="ERROR", component="sanity")
    (tmp_path / "pool").mkdir()
    agent = SanityAgent(tmp_path, nbd_pool=tmp_path / "pool")
    control = Address(path=tmp_path / "control.sock")
    server_config = ServerConfig(
        directory=tmp_path / "pool",
        run_dir=tmp_path / "storage",
        control=control,
        nbd=Address(path=tmp_path / "nbd.sock"),
    )
    server = StorageServer(server_config)
    async with server.running(), listening(server_config, server):
        await _passes(tmp_path, agent, PoolConfig("default", "nbd", str(control)), access_type)


async def _passes(tmp_path: Path, agent: SanityAgent, pool: PoolConfig, access_type: str) -> None:
    config = StandaloneConfig(
        endpoint=f"unix://{tmp_path}/csi.sock",
        node_id="sanity",
        state_dir=tmp_path / "state",
        pools=(pool,),
        agent=AgentConfig(run_dir=tmp_path / "run"),
    )
    async with serving(config, agent, make_node=lambda node: Node(replace(node, sysfs=agent.sysfs))):
        output = await _run(csi_sanity.command(tmp_path / "csi.sock", tmp_path, access_type))
    csi_sanity.read_report(tmp_path, output).require_success(publishes=pool.kind == "nbd")
    assert not agent.attachments
    assert str(tmp_path) not in losetup("--list", "--output", "BACK-FILE")
    assert not [mount for mount in read_mounts() if mount.mount_point.startswith(str(tmp_path))]
    assert not list((tmp_path / "pool").glob("*/*"))


async def _run(argv: list[str]) -> str:
    process = await asyncio.create_subprocess_exec(
        *argv, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        output, _ = await process.communicate()
    return output.decode(errors="replace")
