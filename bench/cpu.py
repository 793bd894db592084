"""What a piece of work cost in CPU time and context switches: two looks into /proc, and their difference.

A look is the text of /proc/stat followed by /proc/PID/stat of the server's processes, because in the VM it is
taken by a shell command that fio runs right before and after a job: Python would be slow there, and late.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

_TICK_S = 1 / os.sysconf("SC_CLK_TCK")
# Of the "cpu" line (proc(5)): user, nice, system, irq, softirq, steal; what is left out is idle and iowait.
_BUSY = (0, 1, 2, 5, 6, 7)
_UTIME, _STIME = 11, 12  # of /proc/PID/stat, counted behind the closing parenthesis of the name


@dataclass(frozen=True)
class Look:
    """Seconds of CPU time used since boot by the machine and by the server, and context switches."""

    machine_s: float
    server_s: float
    switches: int

    def since(self, before: Look) -> Look:
        """What was used between the two."""
        return Look(
            self.machine_s - before.machine_s,
            self.server_s - before.server_s,
            self.switches - before.switches,
        )


def files(pids: Iterable[int]) -> list[str]:
    """The files whose text, one after the other, is a look."""
    return ["/proc/stat", *(f"/proc/{pid}/stat" for pid in pids)]


def parse(text: str) -> Look:
    """Read a look."""
    machine = server = 0.0
    switches = 0
    for line in text.splitlines():
        first, _, rest = line.partition(" ")
        if first == "cpu":
            words = rest.split()
            machine = sum(int(words[index]) for index in _BUSY) * _TICK_S
        elif first == "ctxt":
            switches = int(rest)
        elif first.isdigit():
            words = rest.rpartition(")")[2].split()
            server += (int(words[_UTIME]) + int(words[_STIME])) * _TICK_S
    return Look(machine, server, switches)


def look(pids: Iterable[int]) -> Look:
    """Take a look now."""
    return parse("".join(Path(path).read_text() for path in files(pids)))


def family(pid: int) -> tuple[int, ...]:
    """The process and all its descendants, as they are now."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue  # it ended meanwhile
        parent = int(text.rpartition(")")[2].split()[1])
        parents.setdefault(parent, []).append(int(path.parent.name))
    found = [pid]
    for each in found:  # grows while we walk it
        found += parents.get(each, [])
    return tuple(found)
