"""Before a worker that comes after another one serves a storage server's volume, the export is another one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.agent import handover as handover_module
from csi_vduse.agent import wire
from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node
from csi_vduse.agent.model import AttachSpec, State, attachment_from_json, attachment_to_json
from csi_vduse.agent.workers import Worker
from csi_vduse.dataplane.backend_spec import NbdBackend, from_json, to_json
from csi_vduse.errors import FailedPrecondition, NotFound, Unavailable
from tests.unit.agent.test_agent import assert_nothing_left, until
from tests.unit.fakes.storage import PUBLISHED, FakeStorage

MIB = 1 << 20
pytestmark = pytest.mark.usefixtures("free_disks")


@pytest.fixture
async def storage(tmp_path: Path) -> AsyncIterator[FakeStorage]:
    server = FakeStorage(tmp_path / "control.sock")
    await server.start()
    yield server
    await server.stop()


@pytest.fixture
def spec(storage: FakeStorage) -> AttachSpec:
    return AttachSpec("vol-1", storage.backend, 64 * MIB, queues=2)


@pytest.fixture
def started(node: Node, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """URIs that workers were started with, in order; each was recorded before."""
    uris: list[str] = []
    call = Worker.call

    async def seen(worker: Worker, message: dict[str, Any], *args: Any, **named: Any) -> Any:
        if message["op"] == "start" and message["backend"]["kind"] == "nbd":
            uris.append(message["backend"]["uri"])
            recorded = node.store.find("vol-1")
            assert recorded is not None
            assert isinstance(recorded.backend, NbdBackend)
            assert recorded.backend.uri == uris[-1]
        return await call(worker, message, *args, **named)

    monkeypatch.setattr(Worker, "call", seen)
    return uris


async def until_served(agent: Agent) -> None:
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_an_attach_serves_from_an_export_that_nothing_of_before_can_reach(
    agent, storage, spec, started
):
    """A node that was reset stages again what it had been given, and knows nothing of what it was served from then."""
    storage.served = "v1.7.of-the-boot-before"
    attachment = await agent.attach(spec)
    assert storage.closed == ["v1.7.of-the-boot-before"]
    assert started == [storage.served_uri]
    assert attachment.spec.backend == storage.backend
    assert await agent.attach(spec) == attachment


async def test_a_dead_workers_successor_serves_from_another_export(agent, storage, spec, started, workers):
    before = await agent.attach(spec)
    first = storage.served
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].worker_pid not in (0, before.worker_pid))
    assert storage.closed == [PUBLISHED, first]
    assert started == [started[0], storage.served_uri]
    assert agent.attachments()[0].spec == before.spec


async def test_a_worker_that_dies_while_its_disk_is_bound_has_such_a_successor_too(
    agent, storage, spec, started, workers, kernel, node
):
    async def die_and_wait() -> None:
        workers.processes[0].kill()
        await until(lambda: len(workers.processes) == 2 and kernel.is_open("vol-1"))

    kernel.during_bus_attach = die_and_wait
    await agent.attach(spec)
    assert len(storage.closed) == len(started) == 2
    recorded = node.store.find("vol-1")
    assert (recorded.backend.uri, recorded.state) == (storage.served_uri, State.ATTACHED)


async def test_a_worker_that_dies_while_its_disk_is_unbound_has_such_a_successor_too(
    agent, storage, spec, started, workers, kernel, node, monkeypatch
):
    await agent.attach(spec)
    detach, seen = kernel.detach, []

    async def die_and_wait(name: str, **named: Any) -> None:
        workers.processes[0].kill()
        await until(lambda: len(workers.processes) == 2 and kernel.is_open("vol-1"))
        seen.append(node.store.find("vol-1").state)
        await detach(name, **named)

    monkeypatch.setattr(kernel, "detach", die_and_wait)
    await agent.detach("vol-1")
    assert len(storage.closed) == len(started) == 2
    assert seen == [State.DETACHING]
    assert_nothing_left(kernel, workers, node)


async def test_a_detach_whose_worker_is_dead_has_the_export_renewed_for_the_one_that_ends_it(
    agent, storage, spec, started, workers, kernel, node
):
    await agent.attach(spec)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].state is State.WORKER_DEAD)
    workers.fault = ""
    await agent.detach("vol-1")
    assert started[-1] == storage.served_uri
    assert len(storage.closed) == len(started)
    assert_nothing_left(kernel, workers, node)


async def test_by_force_nobody_is_asked(agent, storage, spec, kernel, workers, node):
    await agent.attach(spec)
    await storage.stop()
    workers.processes[0].kill()
    await until(lambda: "no storage server answers" in agent.attachments()[0].state_reason)
    await agent.detach("vol-1", force=True)
    assert_nothing_left(kernel, workers, node)


async def test_without_its_storage_server_a_volume_is_not_attached_and_nothing_is_left(
    agent, storage, spec, started, kernel, workers, node
):
    await storage.stop()
    with pytest.raises(Unavailable, match=storage.backend.control):
        await agent.attach(spec)
    assert started == []
    assert_nothing_left(kernel, workers, node)
    await storage.start()
    await agent.attach(spec)


async def test_without_its_storage_server_a_dead_worker_has_no_successor_and_people_can_read_why(
    agent, storage, spec, started, workers
):
    await agent.attach(spec)
    await storage.stop()
    workers.processes[0].kill()
    await until(lambda: storage.backend.control in agent.attachments()[0].state_reason)
    assert "is it running and reachable" in agent.attachments()[0].state_reason
    storage.failure = Unavailable("requests of export x are still in flight after 45 s")
    await storage.start()
    await until(lambda: "still in flight" in agent.attachments()[0].state_reason)
    assert len(started) == 1
    storage.failure = None
    await until_served(agent)
    assert started[1:] == [storage.served_uri]


async def test_a_volume_that_was_taken_back_is_not_served_any_more(agent, storage, spec, started, workers):
    await agent.attach(spec)
    storage.failure = NotFound("v1 is not published under this name", hint="unstage the volume there")
    workers.processes[0].kill()
    await until(lambda: "unstage the volume" in agent.attachments()[0].state_reason)
    assert len(started) == 1
    with pytest.raises(NotFound):
        await agent.attach(replace(spec, volume_id="vol-2"))


async def test_an_answer_that_is_lost_costs_no_second_export(agent, storage, spec, started, workers):
    await agent.attach(spec)
    storage.loses_answers = True
    workers.processes[0].kill()
    await until(lambda: len(storage.closed) == 2)
    await until(lambda: "was lost" in agent.attachments()[0].state_reason)
    storage.loses_answers = False
    await until_served(agent)
    assert len(storage.closed) == 2
    assert started[-1] == storage.served_uri


async def test_a_handover_goes_on_with_what_is_served_also_by_the_next_agent(
    agent, storage, spec, started, node
):
    await agent.attach(spec)
    asked = storage.requests
    await agent.handover("vol-1")
    await agent.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    await successor.handover("vol-1")
    assert storage.requests == asked
    assert started == [storage.served_uri] * 3
    await successor.detach("vol-1")
    await successor.close()


@pytest.mark.parametrize("fault", ["stuck", "ancient"])
async def test_a_handover_from_a_worker_that_does_not_let_go_has_the_export_renewed(
    agent, storage, spec, started, workers, node, fault, monkeypatch
):
    monkeypatch.setattr(handover_module, "_RELEASE_TIMEOUT_S", 0.2)
    workers.fault = fault
    await agent.attach(spec)
    workers.fault = ""
    await agent.handover("vol-1")
    assert len(storage.closed) == 2
    assert started[-1] == storage.served_uri == node.store.find("vol-1").backend.uri


async def test_a_handover_that_fails_fences_the_new_worker_before_the_old_one_goes_on(
    agent, storage, spec, started, workers, node
):
    before = await agent.attach(spec)
    workers.fault = "refuse"
    with pytest.raises(FailedPrecondition):
        await agent.handover("vol-1")
    assert agent.attachments()[0].worker_pid == before.worker_pid
    assert len(storage.closed) == 2
    assert started[-1] == storage.served_uri == node.store.find("vol-1").backend.uri


async def test_who_has_no_storage_server_to_ask_is_served_as_before(agent, storage, spec, started, workers):
    plain = replace(spec, backend=replace(storage.backend, control=""))
    await agent.attach(plain)
    workers.processes[0].kill()
    await until(lambda: len(started) == 2)
    await until_served(agent)
    assert storage.requests == 0
    assert started == [storage.backend.uri] * 2


async def test_staging_sees_what_was_asked_for_and_a_release_before_what_is_served(
    agent, storage, spec, node
):
    attachment = await agent.attach(spec)
    told = wire.attachment_from_wire(wire.attachment_to_wire(attachment))
    assert told.spec.backend == spec.backend
    record = attachment_to_json(node.store.find("vol-1"))
    assert record["backend"]["uri"] == storage.served_uri
    assert attachment_from_json(record).spec.backend == spec.backend
    del record["asked_backend"]
    of_before = attachment_from_json(record)
    assert (of_before.spec.backend.uri, of_before.renewed) == (storage.served_uri, None)


def test_where_to_ask_goes_with_the_backend_and_is_not_what_it_is(tmp_path):
    backend = FakeStorage(tmp_path / "control.sock").backend
    assert from_json(to_json(backend)).control == backend.control
    assert wire.backend_from_wire(wire.backend_to_wire(backend)).control == backend.control
    assert backend == replace(backend, control="")
    old = to_json(backend)
    del old["control"]
    assert from_json(old).control == ""
