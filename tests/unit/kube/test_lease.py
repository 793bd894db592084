"""Who leads: one at a time, another soon after the first is gone, and none that could not renew."""

import asyncio

import pytest

from csi_vduse.kube.lease import Election, Timing
from csi_vduse.kube.resources import leases

QUICK = Timing(lease_s=0.6, renew_deadline_s=0.4, retry_s=0.05)
PATH = leases("ns").named("csi-vduse")
TIMEOUT_S = 30.0


@pytest.fixture
async def candidates(api):
    """Elections by name, each with the list of who leads at the moment."""
    tasks, leading = {}, []

    def start(identity):
        election = Election(api, namespace="ns", name="csi-vduse", identity=identity, timing=QUICK)

        async def work():
            leading.append(identity)
            try:
                await asyncio.Event().wait()
            finally:
                leading.remove(identity)

        tasks[identity] = asyncio.create_task(election.lead(work))
        return election

    start.leading, start.tasks = leading, tasks
    yield start
    for task in tasks.values():
        task.cancel()
    await asyncio.gather(*tasks.values(), return_exceptions=True)


async def until(condition):
    async with asyncio.timeout(TIMEOUT_S):
        while not condition():
            await asyncio.sleep(0.01)


async def test_one_leads_and_the_other_follows_when_it_is_gone(candidates, server):
    candidates("a")
    await until(lambda: candidates.leading == ["a"])
    candidates("b")
    candidates.tasks["a"].cancel()
    await until(lambda: candidates.leading == ["b"])
    spec = server.object(PATH)["spec"]
    assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 2)


async def test_a_released_lease_is_taken_without_waiting_for_its_end(candidates, server):
    first = candidates("a")
    await until(lambda: candidates.leading == ["a"])
    await first.release()
    candidates.tasks["a"].cancel()
    assert server.object(PATH)["spec"]["holderIdentity"] in {"", "a"}
    candidates("b")
    await until(lambda: candidates.leading == ["b"])


async def test_a_leader_that_cannot_renew_stops_before_another_begins(candidates, server):
    candidates("a")
    await until(lambda: candidates.leading == ["a"])
    server.away = True
    await until(lambda: candidates.leading == [])
    server.away = False
    await until(lambda: candidates.leading == ["a"])


async def test_a_lease_that_another_took_ends_our_lead(candidates, server):
    candidates("a")
    await until(lambda: candidates.leading == ["a"])
    taken = server.object(PATH)
    taken["spec"] |= {"holderIdentity": "b", "renewTime": "2026-01-01T00:00:00.000000Z"}
    await server.put(PATH, taken)
    await until(lambda: candidates.leading == [])
