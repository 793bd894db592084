"""How long I/O stands still when something happens to who serves it: the longest gap between two completions.

A steady writer (4 KiB, eight in flight) runs on one volume in a process of its own and tells its gaps, with times.
Here it is looked up which of them fell into the time of an event: from just before it until a moment after whoever
serves is back. The same is done with no event at all, and with processes that have nothing to do with us and
compute, because a busy machine pauses by itself: what an event costs is what is beyond that.

What is kept true: the writer saw no error, or the whole measurement fails; every single pause is kept.
"""

from __future__ import annotations

import math
import random
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from bench.servers import BenchError

NOTHING = "nothing happens"
COMPUTING = "two other programs compute"
KILL = "worker kill -9"
AGENT_KILL = "agent kill -9"
HANDOVER = "planned handover"
UPGRADE = "agent upgrade"

# After an event, until what it stirred up has settled: a gap that begins in this time still counts.
_SETTLE_S = 0.5
_TIMEOUT_S = 120.0
# Shorter gaps are not told by the writers.
_SHORTEST_MS = 1.0


@dataclass(frozen=True)
class Series:
    """The pauses of one kind of event, in milliseconds, in the order of the events; volumes: hit by each event."""

    event: str
    volumes: int
    pauses_ms: tuple[float, ...]


@dataclass(frozen=True)
class Event:
    """Something that happens; `act` returns when whoever serves is back.

    rest_s: how long to let everything be before the next one.
    """

    name: str
    act: Callable[[], None]
    rest_s: float


class Writer:
    """The writer's process, and what it has told so far."""

    def __init__(self, argv: Sequence[str]) -> None:
        self._process = subprocess.Popen(argv, stdout=subprocess.PIPE, text=True)
        self._gaps: list[tuple[int, int]] = []
        self._said = ""
        self._changed = threading.Condition()
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def longest_ms(self, begin_ns: int, end_ns: int) -> float:
        """The longest gap that touches this time, at least 1; waits until the writer has come to its end.

        Raises BenchError if the writer fails or hangs.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._said or self._at_ns >= end_ns, _TIMEOUT_S):
                raise BenchError(f"the writer has written nothing for {_TIMEOUT_S:g} s")
            if self._at_ns < end_ns:
                raise BenchError(f"the writer ended: {self._said}")
            touching = [to - since for since, to in self._gaps if to >= begin_ns and since <= end_ns]
        return max(_SHORTEST_MS, *(gap / 1e6 for gap in touching), 0.0)

    def close(self) -> None:
        """End it; raises BenchError if it saw an error."""
        self._process.terminate()
        self._process.wait(_TIMEOUT_S)
        self._reader.join()
        if self._process.returncode or not self._said.startswith("written"):
            raise BenchError(f"the writer: {self._said or self._process.returncode}")

    def kill(self) -> None:
        """End it, whatever it has to say."""
        self._process.kill()
        self._process.wait()
        self._reader.join()

    @property
    def _at_ns(self) -> int:
        return self._gaps[-1][1] if self._gaps else 0

    def _read(self) -> None:
        assert self._process.stdout is not None  # noqa: S101 - it is a pipe
        with self._process.stdout as lines:
            for line in lines:
                words = line.split()
                with self._changed:
                    if len(words) == 2 and words[0].isdecimal():
                        self._gaps.append((int(words[0]), int(words[1])))
                    else:
                        self._said = line.strip()
                    self._changed.notify_all()
        with self._changed:
            self._said = self._said or "it said nothing"
            self._changed.notify_all()


@contextmanager
def writing(argv: Sequence[str]) -> Iterator[Writer]:
    """A running writer; fails at the end if it saw an error."""
    writer = Writer(argv)
    try:
        yield writer
    except BaseException:
        writer.kill()
        raise
    writer.close()


def measure(
    writer: Writer, events: Iterable[Event], *, wanted: str, volumes: int, count: int
) -> list[Series]:
    """Have each event whose name contains one of the words in `wanted` happen `count` times; returns their pauses.

    wanted: words with commas between; empty: every event.
    """
    chosen = [each for each in events if any(word in each.name for word in wanted.split(","))]
    return [_measure(writer, each, volumes=volumes, count=count) for each in chosen]


def _measure(writer: Writer, event: Event, *, volumes: int, count: int) -> Series:
    pauses = []
    for _ in range(count):
        time.sleep(event.rest_s + random.uniform(0.0, 0.2))  # noqa: S311 - not to beat in step with anything
        begin_ns = time.monotonic_ns()
        event.act()
        time.sleep(_SETTLE_S)
        pauses.append(writer.longest_ms(begin_ns, time.monotonic_ns()))
    series = Series(event.name, volumes, tuple(round(pause, 3) for pause in pauses))
    middle, high, most = median_p99_max(pauses)
    print(
        f"{event.name}, {volumes} volumes: median {middle:.1f}, p99 {high:.1f}, max {most:.1f} ms", flush=True
    )
    return series


def median_p99_max(pauses_ms: Sequence[float]) -> tuple[float, float, float]:
    """The three figures that are told; p99 is the smallest that 99 of 100 do not exceed, so the maximum of a few."""
    ordered = sorted(pauses_ms)
    return statistics.median(ordered), ordered[math.ceil(len(ordered) * 0.99) - 1], ordered[-1]


def merged(
    old: dict[str, Any] | None, new: Sequence[Series], conditions: dict[str, object]
) -> dict[str, Any]:
    """The figures of a part with these series in place of those of the same event and volumes."""
    taken = {(each.event, each.volumes) for each in new}
    kept = [each for each in (old or {}).get("series", []) if (each["event"], each["volumes"]) not in taken]
    return {"conditions": conditions, "series": [*kept, *map(asdict, new)]}


def series_of(figures: dict[str, Any] | None) -> list[Series]:
    """The series among the figures of a part."""
    return [
        Series(each["event"], each["volumes"], tuple(each["pauses_ms"]))
        for each in (figures or {}).get("series", [])
    ]
