"""When a volume whose worker died gets another one, and how long it waits for that."""

from __future__ import annotations

import asyncio
import errno

import pytest

from csi_vduse.agent import revive
from csi_vduse.agent.attach import Node
from csi_vduse.agent.revive import Reviver
from csi_vduse.errors import DataLoss, Unavailable


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that were made; they take no time."""
    made: list[float] = []
    sleep = asyncio.sleep

    async def pause(seconds: float) -> None:
        made.append(seconds)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", pause)
    return made


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What the time is: its only element."""
    now = [1000.0]
    monkeypatch.setattr(revive.time, "monotonic", lambda: now[0])
    return now


async def ended(reviver: Reviver) -> None:
    while reviver._tasks:
        await asyncio.gather(*reviver._tasks.values(), return_exceptions=True)


async def test_a_worker_that_dies_before_its_start_is_over_is_replaced_too(pauses: list[float]):
    """It was found, held, and dead at once: its death came while its finder still ran, and was overheard."""
    starts = 0

    async def start(volume_id: str) -> None:
        nonlocal starts
        starts += 1
        if starts == 1:
            reviver.worker_died(volume_id)

    reviver = Reviver(start)
    reviver.worker_died("vol")
    await ended(reviver)
    assert starts == 2
    assert pauses == [0.0, 0.2]


async def test_a_worker_that_keeps_dying_is_replaced_ever_more_slowly(
    pauses: list[float], clock: list[float]
):
    async def start(_volume_id: str) -> None: ...

    reviver = Reviver(start)
    for _ in range(10):
        reviver.worker_died("vol")
        assert reviver.stalled("vol") == (len(pauses) >= len(revive.DELAYS_S))
        await ended(reviver)
    assert pauses == [*revive.DELAYS_S, 10.0, 10.0, 10.0]


def test_the_longest_pause_leaves_time_to_answer_what_the_kernel_has_asked_at_its_beginning(node: Node):
    assert revive.DELAYS_S[-1] <= node.config.msg_timeout_s - 15


async def test_a_worker_that_had_served_for_a_while_is_replaced_at_once(
    pauses: list[float], clock: list[float]
):
    async def start(_volume_id: str) -> None: ...

    reviver = Reviver(start)
    for _ in range(3):
        reviver.worker_died("vol")
        await ended(reviver)
        clock[0] += revive.CALM_S
    assert pauses == [0.0, 0.0, 0.0]


async def test_what_cannot_be_started_is_tried_again_and_a_log_that_does_not_fit_is_not(pauses: list[float]):
    errors = [Unavailable("away"), Unavailable("away"), DataLoss("no log of ours")]

    async def start(_volume_id: str) -> None:
        raise errors.pop(0)

    reviver = Reviver(start)
    reviver.worker_died("vol")
    await ended(reviver)
    assert errors == []
    assert "no log of ours" in reviver.reason("vol")
    assert reviver.stalled("vol")


async def test_nobody_looks_for_a_worker_after_a_stop(pauses: list[float]):
    reached = asyncio.Event()

    async def start(_volume_id: str) -> None:
        reached.set()
        await asyncio.Event().wait()

    reviver = Reviver(start)
    reviver.worker_died("vol")
    await reached.wait()
    await reviver.stop("vol")
    assert not reviver._tasks


async def test_want_of_descriptors_does_not_end_the_search(pauses: list[float]):
    errors: list[OSError] = [OSError(errno.EMFILE, "Too many open files")]
    reasons = []

    async def start(_volume_id: str) -> None:
        reasons.append(reviver.reason("vol"))
        if errors:
            raise errors.pop()

    reviver = Reviver(start)
    reviver.worker_died("vol")
    await ended(reviver)
    assert len(reasons) == 2
    assert "Too many open files" in reasons[1]


async def test_a_search_that_is_stopped_before_it_began_does_not_keep_the_next_from_beginning(
    pauses: list[float],
):
    starts = []

    async def start(volume_id: str) -> None:
        starts.append(volume_id)

    reviver = Reviver(start)
    reviver.worker_died("vol")
    await reviver.stop("vol")
    assert starts == []
    reviver.worker_died("vol")
    async with asyncio.timeout(10):
        await ended(reviver)
    assert starts == ["vol"]
