"""What the kernel said while a test ran: nothing that tells of a fault may be among it."""

from __future__ import annotations

import contextlib
import re
import subprocess
from collections.abc import Iterator

_FAULTS = re.compile(
    r"BUG|WARNING:|Oops|Call Trace|general protection|blocked for more than|hung_task|I/O error|EXT4-fs error"
    r"|EXT4-fs warning|Remounting filesystem|use-after-free|refcount|Buffer I/O|critical (target|medium|space)"
)


def lines() -> list[str]:
    done = subprocess.run(["dmesg"], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout.splitlines()


@contextlib.contextmanager
def stays_quiet(*, except_for: str = "") -> Iterator[None]:
    """Fail if the kernel tells of a fault meanwhile, unless it is of those expected (a regular expression)."""
    before = len(lines())  # the ring buffer holds far more than a run says
    yield
    told = [line for line in lines()[before:] if _FAULTS.search(line)]
    if except_for:
        told = [line for line in told if not re.search(except_for, line)]
    assert not told, "\n".join(told)
