"""The agent over its socket: values arrive as they were sent, errors as the classes they were."""

from __future__ import annotations

import asyncio
import json
import socket
import stat
import subprocess
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_vduse.agent import wire
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.model import (
    Attachment,
    AttachSpec,
    Bus,
    BusDevice,
    State,
    attachment_from_json,
    attachment_to_json,
    device_name,
)
from csi_vduse.agent.server import claim_socket, start_server
from csi_vduse.agent.store import Store
from csi_vduse.dataplane.backend_spec import FileBackend, NullBackend
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import (
    CommandFailed,
    DataLoss,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Unavailable,
)
from tests.unit.fakes.kernel import FakeKernel

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture
async def client(node: Node, tmp_path: Path) -> AsyncIterator[AgentClient]:
    agent = Agent(node, exit_code=lambda _: None)
    server = await start_server(agent, tmp_path / "agent.sock")
    made = AgentClient(tmp_path / "agent.sock")
    yield made
    await made.close()
    await server.stop(None)
    await agent.close()


@pytest.fixture(autouse=True)
def _unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: socket.socket().detach())


async def test_a_volume_goes_through_its_life_over_the_socket(client, kernel: FakeKernel):
    attachment = await client.attach(SPEC)
    assert attachment.spec == SPEC.with_defaults(queues=2)
    assert await client.list() == [attachment]
    inspection = await client.inspect("vol-1")
    assert (inspection.features, inspection.device_status) == (7, 15)
    assert inspection.stats is not None
    assert [inspection.stats] == await client.stats()
    kernel.show_capacity("vol-1", 128 * MIB)
    assert (await client.resize("vol-1", 128 * MIB)).spec.capacity_bytes == 128 * MIB
    await client.quiesce("vol-1", 1)
    await client.resume("vol-1")
    await client.detach("vol-1")
    assert await client.list() == []


async def test_the_throttle_changes_over_the_socket_and_in_the_record(client, node: Node):
    await client.attach(SPEC)
    throttled = await client.throttle("vol-1", Throttle(iops=100))
    assert throttled.spec.throttle == Throttle(iops=100)
    found = node.store.find("vol-1")
    assert found is not None
    assert found.spec.throttle == Throttle(iops=100)
    assert (await client.attach(SPEC)).spec.throttle == Throttle(iops=100)  # the same attachment all the same
    with pytest.raises(NotFound):
        await client.throttle("vol-9", Throttle())


async def test_the_command_line_changes_the_limits_that_are_named_and_shows_latencies(client, tmp_path: Path):
    async def volume(*argv: str) -> dict[str, Any]:
        program = [sys.executable, "-c", "from csi_vduse.cli.main import main; raise SystemExit(main())"]
        words = ["volume", *argv, "--run-dir", str(tmp_path), "--output", "json", "vol-1"]
        ran = await asyncio.create_subprocess_exec(*program, *words, stdout=subprocess.PIPE)
        output, _ = await ran.communicate()
        row: dict[str, Any] = json.loads(output)[0]
        return row

    await client.attach(replace(SPEC, throttle=Throttle(iops=100)))
    changed = await volume("throttle", "--bandwidth", "8M", "--burst-seconds", "2.5")
    assert changed == {"volume": "vol-1", "max_iops": 100, "max_bandwidth": 8 * MIB, "burst_seconds": 2.5}
    shown = await volume("inspect")
    assert (shown["max_bandwidth"], shown["read"]["max_us"]) == (8 * MIB, 250000)
    assert shown["read"]["p50_us"] == pytest.approx(0.2, abs=0.05)


async def test_the_command_line_hands_volumes_over_forces_them_off_and_prepares_for_shutdown(
    client, tmp_path: Path
):
    async def run(*argv: str) -> tuple[int, list[dict[str, Any]]]:
        program = [sys.executable, "-c", "from csi_vduse.cli.main import main; raise SystemExit(main())"]
        words = [*argv, "--run-dir", str(tmp_path), "--output", "json"]
        ran = await asyncio.create_subprocess_exec(*program, *words, stdout=subprocess.PIPE)
        output, _ = await ran.communicate()
        return ran.returncode or 0, json.loads(output)

    before = await client.attach(SPEC)
    code, (row,) = await run("upgrade")
    assert (code, row["volume"], row["problem"]) == (0, "vol-1", "")
    assert str(before.worker_pid) in row["old_worker"]
    assert str((await client.list())[0].worker_pid) in row["worker"]
    assert (await run("upgrade", "--volume", "vol-9")) == (1, [])
    assert await run("volume", "detach", "--force", "vol-1") == (0, [])
    await client.attach(SPEC)
    assert await run("shutdown") == (0, [{"volume": "vol-1", "kept": ""}])
    assert await client.list() == []


async def test_errors_arrive_as_the_classes_they_were(client):
    with pytest.raises(NotFound, match="vol-9 is not attached"):
        await client.inspect("vol-9")
    with pytest.raises(InvalidArgument) as caught:
        await client.attach(AttachSpec("vol-1", NullBackend(), 100))
    assert caught.value.hint
    await client.attach(SPEC)
    with pytest.raises(OutOfRange, match="shrink"):
        await client.resize("vol-1", MIB)


def test_a_state_of_a_later_release_is_one_in_which_the_volume_is_not_served():
    message = wire.attachment_to_wire(Attachment(SPEC, State.ATTACHED))
    message.state = 99  # type: ignore[assignment]
    assert wire.attachment_from_wire(message).state is State.WORKER_DEAD


async def test_a_relative_path_is_refused(client):
    with pytest.raises(InvalidArgument, match="not absolute"):
        await client.attach(AttachSpec("vol-1", FileBackend(Path("image")), MIB))


async def test_without_an_agent_the_client_says_how_to_start_one(tmp_path: Path):
    client = AgentClient(tmp_path / "agent.sock")
    with pytest.raises(Unavailable, match="no agent answers") as caught:
        await client.list()
    assert "csi-vduse agent" in caught.value.hint
    await client.close()


async def test_probe_names_the_missing_module(client, kernel: FakeKernel):
    assert (await client.probe()).ready
    (kernel.root / "sys/bus/vdpa/drivers/vhost_vdpa").rmdir()
    probe = await client.probe()
    assert (probe.ready, "modprobe vhost_vdpa" in probe.problems[0]) == (False, True)


async def test_only_root_may_connect(client, tmp_path: Path):
    await client.list()
    assert stat.S_IMODE((tmp_path / "agent.sock").stat().st_mode) == 0o600


def test_a_socket_that_somebody_listens_on_is_not_taken(tmp_path: Path):
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()
        with pytest.raises(FailedPrecondition, match="another process listens"):
            claim_socket(path)
    claim_socket(path)  # stale now
    assert not path.exists()
    path.write_text("precious")
    with pytest.raises(FailedPrecondition, match="not a socket"):
        claim_socket(path)
    assert path.read_text() == "precious"


def test_a_socket_path_that_does_not_fit_is_refused(tmp_path: Path):
    with pytest.raises(InvalidArgument, match="107"):
        claim_socket(tmp_path / ("x" * 100) / "agent.sock")


@pytest.mark.parametrize("state", list(State))
def test_an_attachment_survives_wire_and_record(state: State, tmp_path: Path):
    attachment = Attachment(
        AttachSpec(
            "vol-1",
            NullBackend(),
            MIB,
            Bus.VHOST,
            read_only=True,
            queues=3,
            queue_size=64,
            block_size_bytes=4096,
            throttle=Throttle(1000, 1 << 20, 2.5),
        ),
        state,
        "why",
        BusDevice(Path("/dev/vhost-vdpa-3"), 236, 3),
        42,
    )
    assert wire.attachment_from_wire(wire.attachment_to_wire(attachment)) == attachment
    store = Store(tmp_path)
    store.save(attachment)
    assert store.find("vol-1") == attachment
    assert store.is_of_this_boot("vol-1")


def test_a_record_from_before_there_were_limits_has_none(tmp_path: Path):
    record = attachment_to_json(Attachment(SPEC, State.ATTACHED))
    del record["throttle"]
    assert attachment_from_json(record).spec.throttle == Throttle()


def test_a_damaged_record_is_reported_and_kept(tmp_path: Path):
    store = Store(tmp_path)
    record = tmp_path / device_name("vol-1") / "record.json"
    record.parent.mkdir()
    for text in ("{", '{"version": 1}', '{"version": 99}', "[]"):
        record.write_text(text)
        with pytest.raises(DataLoss):
            store.find("vol-1")
        assert record.read_text() == text


def test_a_program_that_failed_elsewhere_is_told_as_what_it_said():
    """CommandFailed is made of an argv, which does not travel."""
    failed = CommandFailed(["qemu-img", "create"], 1, "no space")
    code, message, metadata = wire.error_status(failed)
    told = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*metadata), details=message)
    error = wire.error_from_rpc(told)
    assert (error.grpc_code, error.message) == (failed.grpc_code, failed.message)
