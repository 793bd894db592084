"""Attach, detach, resize and their failures, on a kernel and workers that refuse what the real ones do."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.agent.agent import Agent
from csi_vduse.agent.attach import Node, attach, bounce_size_bytes
from csi_vduse.agent.model import AttachSpec, Bus, State, device_name
from csi_vduse.agent.store import Store
from csi_vduse.dataplane.backend_spec import FileBackend, NullBackend
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Pending,
    ResourceExhausted,
    Unavailable,
    VduseError,
)
from tests.unit.fakes.kernel import FakeKernel
from tests.unit.fakes.worker import FakeWorkers

MIB = 1 << 20
SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 64 * MIB, queues=2)


@pytest.fixture(autouse=True)
def _unclaimed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake disk is no block device: claiming it opens nothing."""
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.claim_disk", lambda *_: os.open("/dev/null", os.O_RDONLY))


def assert_nothing_left(kernel: FakeKernel, workers: FakeWorkers, node: Node) -> None:
    assert kernel.devices == {}
    assert list((kernel.root / "sys/bus/vdpa/devices").iterdir()) == []
    assert not node.store.directory.exists() or list(node.store.directory.iterdir()) == []
    workers.wait_for_none()


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


async def test_attach_serves_before_the_bus_and_detach_leaves_nothing(agent, kernel, workers, node):
    attachment = await agent.attach(SPEC)
    assert kernel.steps == ["create", "msg_timeout", "bounce_size", "open", "bus attach"]
    assert (attachment.state, attachment.device.major) == (State.ATTACHED, 254)
    assert kernel.devices["vol-1"].attributes == {"msg_timeout": 30, "bounce_size": bounce_size_bytes(2, 256)}
    await agent.detach("vol-1")
    assert kernel.steps[-2:] == ["bus detach", "destroy"]
    assert agent.attachments() == []
    assert_nothing_left(kernel, workers, node)


async def test_what_requests_wait_for_is_told(agent, workers):
    workers.fault = "full"
    await agent.attach(SPEC)
    await agent.inspect("vol-1")
    assert "ENOSPC" in agent.attachments()[0].state_reason
    await agent.detach("vol-1")


async def test_a_vm_gets_no_bounce_memory_and_more_time(agent, kernel):
    await agent.attach(replace(SPEC, bus=Bus.VHOST))
    assert kernel.devices["vol-1"].attributes == {"msg_timeout": 120}


@pytest.mark.parametrize("step", ["create", "msg_timeout", "bounce_size", "open", "bus attach"])
async def test_whatever_step_fails_nothing_is_left_behind(agent, kernel, workers, node, step):
    kernel.fail[step] = VduseError(f"{step} failed")
    with pytest.raises(VduseError, match=f"{step} failed"):
        await agent.attach(SPEC)
    assert agent.attachments() == []
    assert_nothing_left(kernel, workers, node)
    kernel.fail.clear()
    assert (await agent.attach(SPEC)).state is State.ATTACHED


@pytest.mark.parametrize(
    ("fault", "error"),
    [("refuse", FailedPrecondition), ("die", Unavailable), ("mute", DeadlineExceeded)],
)
async def test_a_worker_that_does_not_start_leaves_nothing_behind(agent, kernel, node, fault, error):
    node.spawner.fault = fault
    with pytest.raises(error):
        await agent.attach(SPEC)
    assert agent.attachments() == []
    assert_nothing_left(kernel, node.spawner, node)


async def test_an_attach_that_cannot_be_undone_is_finished_by_detach(agent, kernel, workers, node):
    kernel.fail = {"bus attach": VduseError("no"), "destroy": VduseError("busy")}
    with pytest.raises(VduseError):
        await agent.attach(SPEC)
    assert [each.state for each in agent.attachments()] == [State.DETACHING]
    kernel.fail.clear()
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_where_no_worker_can_serve_an_attach_is_refused_at_once(agent, kernel, workers, node):
    kernel.refusal = "io_uring cannot be used (Operation not permitted): set the sysctl"
    assert (agent.probe().problems, agent.probe().ready) == ((kernel.refusal,), False)
    with pytest.raises(FailedPrecondition, match="io_uring cannot be used"):
        await agent.attach(SPEC)
    assert_nothing_left(kernel, workers, node)


async def test_the_same_again_is_the_same_even_with_an_older_capacity(agent, workers):
    first = await agent.attach(SPEC)
    assert await agent.attach(replace(SPEC, capacity_bytes=MIB)) == first
    assert len(workers.processes) == 1
    with pytest.raises(AlreadyExists, match="other settings"):
        await agent.attach(replace(SPEC, read_only=True))


async def test_a_foreign_device_is_not_touched(agent, kernel):
    (kernel.root / "sys/class/vduse/vol-1").mkdir()
    with pytest.raises(AlreadyExists, match="did not make"):
        await agent.attach(SPEC)
    assert kernel.steps == []


async def test_a_second_operation_on_a_volume_is_told_to_come_back(agent):
    first = asyncio.create_task(agent.attach(SPEC))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    with pytest.raises(Pending):
        await agent.detach("vol-1")
    await first


async def test_an_attach_goes_on_when_its_caller_goes_away(agent):
    caller = asyncio.create_task(agent.attach(SPEC))
    await until(agent.attachments)
    caller.cancel()
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_a_node_takes_its_maximum_and_no_more(agent):
    for number in range(3):
        await agent.attach(replace(SPEC, volume_id=f"vol-{number}"))
    with pytest.raises(ResourceExhausted, match="maximum of 3"):
        await agent.attach(replace(SPEC, volume_id="vol-3"))


async def test_detach_refuses_a_mounted_disk_and_says_where(agent, kernel):
    await agent.attach(SPEC)
    kernel.mount("/mnt/data")
    with pytest.raises(FailedPrecondition, match="/mnt/data"):
        await agent.detach("vol-1")
    assert agent.attachments()[0].state is State.ATTACHED


async def test_a_worker_that_dies_is_replaced_at_once(agent, kernel, workers, node):
    before = await agent.attach(SPEC)
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].worker_pid not in (0, before.worker_pid))
    assert agent.attachments()[0].state is State.ATTACHED
    assert len(workers.processes) == 2
    assert await agent.attach(SPEC) == agent.attachments()[0]
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_a_volume_that_cannot_be_served_waits_and_says_why(agent, workers):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].send_signal(signal.SIGKILL)
    await until(lambda: "the image is missing" in agent.attachments()[0].state_reason)
    assert agent.attachments()[0].state is State.WORKER_DEAD
    assert "signal 9" in agent.attachments()[0].state_reason
    with pytest.raises(Unavailable, match="worker_dead"):
        await agent.attach(SPEC)
    with pytest.raises(Unavailable, match="consistent"):
        await agent.quiesce("vol-1", 1)
    workers.fault = ""
    await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_a_worker_that_dies_again_and_again_is_replaced_ever_more_slowly(agent, workers):
    await agent.attach(SPEC)
    workers.fault = "die"
    workers.processes[0].kill()
    await asyncio.sleep(1.5)
    assert 3 <= len(workers.processes) <= 6
    assert agent.attachments()[0].state is State.WORKER_DEAD


async def test_a_log_that_is_not_the_devices_stops_recovery_and_says_so(agent, workers, node):
    await agent.attach(SPEC)
    workers.fault = "foreign log"
    workers.processes[0].kill()
    await until(lambda: "not of this device" in agent.attachments()[0].state_reason)
    await asyncio.sleep(0.5)
    assert len(workers.processes) == 2  # no guess, and no storm either
    assert agent.attachments()[0].state is State.STALLED


async def test_a_worker_that_dies_while_the_disk_is_bound_is_replaced(agent, kernel, workers):
    async def die_and_wait() -> None:
        workers.processes[0].kill()
        await until(lambda: len(workers.processes) == 2 and kernel.is_open("vol-1"))

    kernel.during_bus_attach = die_and_wait
    attachment = await agent.attach(SPEC)
    assert attachment.worker_pid == workers.processes[1].pid


async def test_detach_with_a_dead_worker_uses_another(agent, kernel, workers, node):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].state is State.WORKER_DEAD)
    workers.fault = ""
    kernel.put_in_flight("vol-1", reads=1, writes=2)
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_a_device_that_the_kernel_gave_up_while_nobody_served_it_is_told_and_can_be_detached(
    agent, kernel, workers, node
):
    await agent.attach(SPEC)
    kernel.devices["vol-1"].broken = True
    workers.fault = "given up"
    workers.processes[0].kill()
    await until(lambda: agent.attachments()[0].state is State.BROKEN)
    assert len(workers.processes) == 2  # nobody can serve it
    kernel.put_in_flight("vol-1", reads=1, writes=2)
    with pytest.raises(FailedPrecondition, match="3 requests"):
        await agent.detach("vol-1")
    kernel.put_in_flight("vol-1", reads=0, writes=0)
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_by_force_a_mounted_disk_goes_although_its_image_is_missing(agent, kernel, workers, node):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    workers.processes[0].kill()
    await until(lambda: "the image is missing" in agent.attachments()[0].state_reason)
    kernel.mount("/mnt/data")
    await agent.detach("vol-1", force=True)
    assert_nothing_left(kernel, workers, node)


async def test_by_force_a_worker_whose_backend_hangs_is_not_waited_for(agent, kernel, workers, node):
    workers.fault = "slow"
    await agent.attach(SPEC)
    kernel.put_in_flight("vol-1", reads=1, writes=2)
    await agent.detach("vol-1", force=True)
    assert_nothing_left(kernel, workers, node)


async def test_a_device_that_a_vm_has_open_does_not_go_by_force_either(agent, kernel, monkeypatch):
    await agent.attach(replace(SPEC, bus=Bus.VHOST))
    monkeypatch.setattr("csi_vduse.vdpa.sysfs.Sysfs.openers", lambda *_: ["42 (qemu)"])
    monkeypatch.setattr("csi_vduse.agent.detach._OPENERS_GRACE_S", 0.1)
    with pytest.raises(FailedPrecondition, match="qemu"):
        await agent.detach("vol-1", force=True)
    assert agent.attachments()[0].state is State.ATTACHED


async def test_a_detach_by_force_that_failed_is_finished_by_an_ordinary_one(agent, kernel, workers, node):
    await agent.attach(SPEC)
    workers.fault = "refuse"
    kernel.fail["bus detach"] = DeadlineExceeded("stuck")
    with pytest.raises(DeadlineExceeded):
        await agent.detach("vol-1", force=True)
    assert agent.attachments()[0].state is State.DETACHING
    kernel.fail.clear()
    await agent.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


async def test_the_next_agent_replaces_a_worker_that_died_while_nobody_looked(agent, workers, node):
    await agent.attach(SPEC)
    await agent.close()
    workers.processes[0].kill()
    workers.processes[0].wait()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    await until(lambda: successor.attachments()[0].state is State.ATTACHED)
    await successor.close()


async def test_the_next_agent_adopts_a_living_worker(agent, kernel, node, workers):
    before = await agent.attach(SPEC)
    await agent.close()
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert successor.attachments() == [before]
    await successor.detach("vol-1")
    assert_nothing_left(kernel, workers, node)


@pytest.mark.parametrize("state", ["attaching", "detaching"])
async def test_the_next_agent_finishes_what_was_half_way(agent, kernel, node, workers, state):
    await agent.attach(SPEC)
    await agent.close()
    record = node.store.directory / "vol-1/record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": state}))
    successor = Agent(node, exit_code=lambda _: None)
    await successor.recover()
    assert successor.attachments() == []
    assert_nothing_left(kernel, workers, node)


async def test_a_record_of_an_earlier_boot_is_forgotten(node):
    (node.store.directory / "vol-1").mkdir(parents=True)
    (node.store.directory / "vol-2").mkdir()
    agent = Agent(node, exit_code=lambda _: None)
    await agent.recover()
    assert list(node.store.directory.iterdir()) == []


async def test_resize_returns_when_the_disk_shows_the_capacity(agent, kernel):
    await agent.attach(SPEC)
    growing = asyncio.create_task(agent.resize("vol-1", 128 * MIB))
    await asyncio.sleep(0.2)
    assert not growing.done()
    kernel.show_capacity("vol-1", 128 * MIB)
    assert (await growing).spec.capacity_bytes == 128 * MIB
    with pytest.raises(OutOfRange, match="shrink"):
        await agent.resize("vol-1", 64 * MIB)
    with pytest.raises(NotFound):
        await agent.resize("vol-2", 64 * MIB)


async def test_a_late_answer_is_not_taken_for_another_requests(agent, workers):
    workers.fault = "deaf"
    await agent.attach(SPEC)
    with pytest.raises(DeadlineExceeded):
        await agent.resize("vol-1", 128 * MIB)
    inspection = await agent.inspect("vol-1")
    assert inspection.stats is not None
    assert inspection.stats.operations[0].latency == (0, 2, 1)


async def test_a_capacity_that_the_driver_may_have_heard_of_is_what_the_next_worker_has(agent, workers, node):
    workers.fault = "deaf"
    await agent.attach(SPEC)
    with pytest.raises(DeadlineExceeded):
        await agent.resize("vol-1", 128 * MIB)
    recorded = node.store.find("vol-1")
    assert agent.attachments()[0].spec == recorded.spec
    assert recorded.spec.capacity_bytes == 128 * MIB


async def test_hold_is_bounded_and_fine_for_volumes_that_are_not_here(agent):
    await agent.attach(SPEC)
    await agent.quiesce("vol-1", 5)
    await agent.resume("vol-1")
    await agent.quiesce("elsewhere", 5)
    for hold_s in (0, -1, 1000, float("nan")):
        with pytest.raises(InvalidArgument):
            await agent.quiesce("vol-1", hold_s)


@pytest.mark.parametrize("volume_id", ["a/b", "..", "control", "ö", "x" * 100, "UPPER"])
def test_a_volume_id_that_is_no_safe_name_becomes_a_digest(volume_id):
    name = device_name(volume_id)
    assert name.startswith("vol-")
    assert len(name) == 20


def test_bounce_memory_stays_within_bounds_and_is_whole_pages():
    assert bounce_size_bytes(1, 4) == 16 * MIB
    assert bounce_size_bytes(16, 1024) == 256 * MIB
    assert bounce_size_bytes(1, 256) % 4096 == 0


def test_a_null_volume_needs_no_path():
    assert AttachSpec("v", NullBackend(), MIB).with_defaults(queues=4).queues == 4


async def test_who_asks_a_worker_while_it_dies_gets_an_answer(agent, workers):
    await agent.attach(SPEC)
    for number in range(3):
        asked = [asyncio.create_task(agent.inspect("vol-1")) for _ in range(5)]
        await asyncio.sleep(0)
        workers.processes[number].kill()
        for inspection in await asyncio.gather(*asked):
            assert inspection.attachment.volume_id == "vol-1"
        await until(lambda number=number: len(workers.processes) == number + 2)
        await until(lambda: agent.attachments()[0].state is State.ATTACHED)


async def test_a_run_directory_too_deep_for_a_workers_socket_is_refused(agent, kernel, workers, node):
    deep = replace(node, store=Store(node.store.directory / ("d" * 80)))
    with pytest.raises(InvalidArgument, match="the kernel allows"):
        await attach(deep, SPEC.with_defaults(queues=1))
    assert_nothing_left(kernel, workers, node)
