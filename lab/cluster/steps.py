"""Steps that say what they do and how long it took, for whoever waits in front of the terminal.

What is kept true: a step that fails says so too, with its time, before the error goes on.
"""

import contextlib
import time
from collections.abc import Iterator

from lab.host import say


@contextlib.contextmanager
def step(what: str) -> Iterator[None]:
    """Print what is done, and how long it took."""
    started = time.monotonic()
    try:
        yield
    except BaseException:
        say(f"cluster: {what}: failed after {time.monotonic() - started:.1f} s")
        raise
    say(f"cluster: {what}: {time.monotonic() - started:.1f} s")
