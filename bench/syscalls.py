"""System calls of processes, counted by the kernel's own tracing: cheap enough to leave the figures as they are, nearly.

tracefs keeps one count for each thread (a histogram trigger on raw_syscalls:sys_enter); here they are added up.
Needs root, and a kernel with CONFIG_HIST_TRIGGERS.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.servers import BenchError, tool

_TRACING = Path("/sys/kernel/tracing")
_EVENT = _TRACING / "events/raw_syscalls/sys_enter"
_TRIGGER = "hist:keys=common_pid:size=4096"
_LINE = re.compile(r"common_pid:\s*(\d+)\s*\} hitcount:\s*(\d+)")


@contextmanager
def counting() -> Iterator[None]:
    """Count in the body; `counts` reads."""
    if not _EVENT.exists():
        tool("mount", "-t", "tracefs", "tracefs", str(_TRACING))
    try:
        (_EVENT / "trigger").write_text(_TRIGGER)
    except OSError as error:
        raise BenchError(f"this kernel counts no system calls: {error.strerror}") from error
    try:
        yield
    finally:
        (_EVENT / "trigger").write_text(f"!{_TRIGGER}")


def counts(pids: Iterable[int]) -> int:
    """System calls of these processes, all their threads, since counting began."""
    threads = {int(task.name) for pid in pids for task in Path(f"/proc/{pid}/task").iterdir()}
    found = _LINE.findall((_EVENT / "hist").read_text())
    return sum(int(number) for thread, number in found if int(thread) in threads)
