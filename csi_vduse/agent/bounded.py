"""A call that may hang in the kernel, from an event loop that must not: in a thread, with a deadline.

Kept true: what the call makes after its deadline is given back by `undo`, and a thread that never returns keeps
neither the event loop nor the end of the process waiting.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

from csi_vduse.errors import DeadlineExceeded

T = TypeVar("T")


async def bounded(what: str, act: Callable[[], T], *, timeout_s: float, undo: Callable[[T], None]) -> T:
    """Return what `act` returns, or raise what it raises.

    Raises:
        DeadlineExceeded: it takes longer than timeout_s; it goes on, and its result is undone.
    """
    loop = asyncio.get_running_loop()
    outcome: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if outcome.done():
            undo(result)
        else:
            outcome.set_result(result)

    def fail(error: BaseException) -> None:
        if not outcome.done():
            outcome.set_exception(error)

    def run() -> None:
        try:
            result = act()
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is awaited
            with contextlib.suppress(RuntimeError):  # nobody waits any more: the loop is closed
                loop.call_soon_threadsafe(fail, error)
            return
        try:
            loop.call_soon_threadsafe(deliver, result)
        except RuntimeError:
            undo(result)

    threading.Thread(target=run, name=f"bounded {what}", daemon=True).start()
    try:
        return await asyncio.wait_for(outcome, timeout_s)  # which cancels it when it is too late
    except TimeoutError as error:
        raise DeadlineExceeded(
            f"{what} takes more than {timeout_s:g} s: it hangs in the kernel",
            hint="retry; the kernel log may say why",
        ) from error
