"""`make test`: all parts, side by side where that disturbs none, and how long each took.

What runs is in tests/parts.toml. What is kept true: a part's output is shown whole, when it ends; after one that failed
none is started, and the exit code is not 0; every part has its time in the table at the end, beside its budget; one that
hangs is ended, as from a terminal first so that it can say where it was, and has failed.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO
from xml.etree import ElementTree as ET

_SLOWEST = 20
_POLL_S = 0.2
_HANGS = 3.0  # times its budget
_GRACE_S = 30.0  # between the signals that end a part


@dataclass(frozen=True)
class Part:
    """A target of the Makefile; see tests/parts.toml."""

    name: str
    cores: int
    budget_s: float
    needs: tuple[str, ...] = ()


@dataclass
class Run:
    """A part that was started."""

    part: Part
    directory: Path
    output: IO[bytes] = field(default_factory=tempfile.TemporaryFile)
    started: float = field(default_factory=time.monotonic)
    took_s: float = 0.0
    signals: list[signal.Signals] = field(
        default_factory=lambda: [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]
    )

    def __post_init__(self) -> None:
        """Start it."""
        _say(f"{self.part.name} begins")
        command = ["make", "--no-print-directory", self.part.name]
        self.process = subprocess.Popen(
            command,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        self.ends_at = self.started + _HANGS * self.part.budget_s

    def ended(self) -> bool:
        """Whether it has ended; its output is shown then."""
        if self.process.poll() is None:
            if time.monotonic() > self.ends_at and self.signals:
                self.end()
            return False
        self.took_s = time.monotonic() - self.started
        self.output.seek(0)
        sys.stdout.flush()
        sys.stdout.buffer.write(self.output.read())
        self.output.close()
        _say(
            f"{self.part.name} {'failed' if self.process.returncode else 'passed'} after {self.took_s:.0f} s"
        )
        return True

    def end(self) -> None:
        """Send all of its processes the next signal, each stronger than the one before."""
        number = self.signals.pop(0)
        self.ends_at = time.monotonic() + _GRACE_S
        _say(f"{self.part.name} is ended by {number.name} after {time.monotonic() - self.started:.0f} s")
        os.killpg(self.process.pid, number)


def main() -> int:
    """Run everything; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--results", type=Path, required=True, help="where the parts write their *.xml")
    parser.add_argument("--directory", type=Path, default=Path.cwd(), help="of the Makefile")
    options = parser.parse_args()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # or parts of a background job would not heed it
    began = time.time()
    ended = _run_all(_parts(options.directory), options.directory)
    _show(ended, _cases(options.results, since=began))
    failed = [run.part.name for run in ended if run.process.returncode]
    _say(f"{'failed: ' + ', '.join(failed) if failed else 'all passed'}, {time.time() - began:.0f} s")
    return 1 if failed else 0


def _parts(directory: Path) -> list[Part]:
    table = tomllib.loads((directory / "tests/parts.toml").read_text())
    return [
        Part(name, one["cores"], one["budget_s"], tuple(one.get("needs", ()))) for name, one in table.items()
    ]


def _run_all(waiting: list[Part], directory: Path) -> list[Run]:
    """Run parts in their order, as early as processors and needs allow."""
    running: list[Run] = []
    ended: list[Run] = []
    cores = os.cpu_count() or 1
    try:
        while waiting or running:
            for run in [run for run in running if run.ended()]:
                running.remove(run)
                ended.append(run)
            passed = {run.part.name for run in ended if not run.process.returncode}
            if len(passed) < len(ended):
                waiting.clear()
            for part in list(waiting):
                taken = sum(run.part.cores for run in running)
                if taken and taken + part.cores > cores:
                    break
                if passed.issuperset(part.needs):
                    waiting.remove(part)
                    running.append(Run(part, directory))
            time.sleep(_POLL_S)
    finally:
        for run in running:
            run.end()
    return ended


def _cases(results: Path, *, since: float) -> list[ET.Element]:
    """The tests, by what the parts wrote since then."""
    files = [file for file in results.glob("*.xml") if file.stat().st_mtime >= since]
    return [case for file in files for case in ET.parse(file).iter("testcase")]  # noqa: S314 - ours


def _show(ended: list[Run], cases: list[ET.Element]) -> None:
    timed = [(float(case.get("time", 0)), f"{case.get('classname')}::{case.get('name')}") for case in cases]
    print("\nslowest tests, in seconds")
    for took_s, name in sorted(timed, reverse=True)[:_SLOWEST]:
        print(f"{took_s:8.1f}  {name}")
    print("\nparts, in seconds, and their budgets")
    for run in ended:
        late = "  past its budget (tests/parts.toml)" if run.took_s > run.part.budget_s else ""
        print(f"{run.took_s:8.0f} {run.part.budget_s:6.0f}  {run.part.name}{late}")
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    skipped = sum(case.find("skipped") is not None for case in cases)
    print(f"\n{len(cases) - failed - skipped} passed, {failed} failed, {skipped} skipped")


def _say(text: str) -> None:
    print(f"test: {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
