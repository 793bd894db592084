"""A call that may hang has a deadline, and what it makes too late is given back."""

from __future__ import annotations

import asyncio
import threading

import pytest

from csi_vduse.agent.bounded import bounded
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition


async def test_results_and_errors_come_through():
    undone: list[int] = []
    assert await bounded("adding", lambda: 1 + 1, timeout_s=10, undo=undone.append) == 2

    def refuse() -> int:
        raise FailedPrecondition("in use")

    with pytest.raises(FailedPrecondition, match="in use"):
        await bounded("refusing", refuse, timeout_s=10, undo=undone.append)
    assert undone == []


async def test_a_result_that_comes_too_late_is_undone():
    go, undone = threading.Event(), asyncio.Event()

    def slow() -> int:
        go.wait(10)
        return 7

    with pytest.raises(DeadlineExceeded, match="opening takes more than"):
        await bounded("opening", slow, timeout_s=0.05, undo=lambda _: undone.set())
    go.set()
    await asyncio.wait_for(undone.wait(), 10)
