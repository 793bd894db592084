"""Where calls that can block on a disk run: a small pool of threads, never the event loop.

Invariant: the number of threads is bounded, so a file system that hangs holds up at most that many calls; the
others wait and end with DeadlineExceeded instead of piling up threads.
"""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import ParamSpec, TypeVar

from csi_vduse.errors import DeadlineExceeded

P = ParamSpec("P")
R = TypeVar("R")

DEFAULT_TIMEOUT_S = 60.0


class BlockingPool:
    """Threads for blocking calls.

    Args:
        name: of the threads, for debuggers.
        max_threads: how many calls run at once.
    """

    def __init__(self, name: str, max_threads: int) -> None:
        self._name = name
        self._executor = ThreadPoolExecutor(max_threads, thread_name_prefix=name)

    async def run(self, timeout_s: float, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        """Call `function` in a thread and return what it returns.

        Args:
            timeout_s: after this the caller goes on; the thread ends its call in its own time.
            function: what to call.
            args: its arguments.
            kwargs: its named arguments.

        Raises:
            DeadlineExceeded: it took longer.
        """
        future = asyncio.get_running_loop().run_in_executor(
            self._executor, functools.partial(function, *args, **kwargs)
        )
        # A call that did not start in time never starts: wait_for cancels it.
        try:
            return await asyncio.wait_for(future, timeout_s)
        except TimeoutError as error:
            name = getattr(function, "__name__", repr(function))
            raise DeadlineExceeded(
                f"{self._name}: {name} did not end within {timeout_s:g} s",
                hint="the file system is slow or hangs; look for I/O errors in the kernel log",
            ) from error

    def close(self) -> None:
        """Let running calls end by themselves and start no more."""
        self._executor.shutdown(wait=False, cancel_futures=True)
