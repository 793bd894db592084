"""Measure, or show what was measured: `python -m bench --help`.

Parts that need a VDUSE kernel boot a machine of the laboratory and run themselves in it, each in a boot of its
own; `LAB=host` says that this host has such a kernel. A part that fails does not keep the others from running.
"""

from __future__ import annotations

import argparse
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from bench import report, results
from lab.errors import LabError
from lab.machine import Machine
from lab.tap import Nic

VM_PARTS = ("vm", "remote", "loopback", "scale", "pause")
# An event takes up to 15 s in an emulated machine: a hundred of each kind are hours there.
EVENTS, QUICK_EVENTS = {"pause-native": 100, "pause": 10}, 2
_PART_S, _PAUSE_S = 2400.0, 6 * 3600.0


def main() -> int:
    """Do what the command line says; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(results.PARTS)}, report; default: all"
    )
    parser.add_argument(
        "--quick", action="store_true", help="only prove that everything runs: figures are void"
    )
    parser.add_argument("--folder", type=Path, help="where the image is made (default: a tmpfs)")
    parser.add_argument(
        "--publish", action="store_true", help="report: into docs/, instead of the results folder"
    )
    defaults = ", ".join(f"{part}: {count}" for part, count in EVENTS.items())
    parser.add_argument("--events", type=int, help=f"pause parts: how many of each event ({defaults})")
    parser.add_argument(
        "--only",
        default="",
        help="pause parts: only events with one of these words (A,B) in their name; the figures of others stay",
    )
    parser.add_argument("--name", default="bench", help="of the machine that is booted")
    options = parser.parse_args()
    parts = options.parts or [*results.PARTS, "report"]
    if unknown := set(parts) - {*results.PARTS, "report"}:
        parser.error(f"there is no part {' '.join(unknown)}")
    failed = []
    for part in parts:
        started = time.monotonic()
        try:
            _do(part, options)
        except (LabError, RuntimeError, OSError, subprocess.SubprocessError) as error:
            print(f"bench: {part} failed: {error}", file=sys.stderr, flush=True)
            failed.append(part)
        print(f"bench: {part} took {time.monotonic() - started:.0f} s", flush=True)
    return 1 if failed else 0


def _do(part: str, options: argparse.Namespace) -> None:
    if part == "report":
        print(f"bench: {report.write(publish=options.publish)}")
        return
    if part in VM_PARTS and os.environ.get("LAB") not in {"guest", "host"}:
        _in_a_machine(part, options)
        return
    figures = _measure(part)(options)
    figures["quick"] = options.quick
    print(f"bench: raw figures: {results.save(part, figures)}")


def _in_a_machine(part: str, options: argparse.Namespace) -> None:
    argv = [sys.executable, "-m", "bench", part, *(["--quick"] if options.quick else [])]
    argv += ["--folder", str(options.folder)] if options.folder else []
    argv += ["--events", str(options.events)] if options.events else []
    argv += ["--only", options.only] if options.only else []
    busy = f"{os.getloadavg()[0]:.2f}"  # a guest cannot see what else its host does
    with ExitStack() as up:
        nic = up.enter_context(_storage_machine()) if part == "remote" else None
        machine = up.enter_context(Machine(options.name, kind="qemu", nic=nic))
        code = machine.stream(
            argv, timeout_s=_PAUSE_S if part == "pause" else _PART_S, env={"LAB_HOST_LOAD": busy}
        )
    if code:
        raise RuntimeError(f"`{shlex.join(argv)}` ended with {code} in the machine")


def _storage_machine() -> AbstractContextManager[Nic]:
    from bench import network, remote  # noqa: PLC0415 - see below

    return network.storage_machine(remote.nbdkit(network.SERVER))


def _measure(part: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    """The function that measures a part; imported when needed, because imports are slow in a guest."""
    if part == "vm":
        from bench import vm  # noqa: PLC0415 - see above

        return lambda options: vm.measure(
            vm.QUICK if options.quick else vm.Effort(), options.folder or vm.SCRATCH
        )
    if part in {"remote", "loopback"}:
        from bench import network, remote, vm  # noqa: PLC0415 - see above

        host = network.SERVER if part == "remote" else remote.LOOPBACK
        return lambda options: remote.measure(vm.QUICK if options.quick else vm.Effort(), host)
    if part == "native":
        from bench import native  # noqa: PLC0415 - see above

        return lambda options: native.measure(
            native.QUICK if options.quick else native.Effort(), options.folder
        )
    if part == "instructions":
        from bench import instructions  # noqa: PLC0415 - see above

        return lambda _options: instructions.measure()
    if part in {"pause", "pause-native"}:
        return _pauses(part)
    from bench import scale  # noqa: PLC0415 - see above

    return lambda options: scale.measure((1, 3) if options.quick else scale.VOLUMES)


def _pauses(part: str) -> Callable[[argparse.Namespace], dict[str, Any]]:
    def count(options: argparse.Namespace) -> int:
        return int(options.events or (QUICK_EVENTS if options.quick else EVENTS[part]))

    if part == "pause":
        from bench import pause_vm, vm  # noqa: PLC0415 - see above

        return lambda options: pause_vm.measure(count(options), options.only, options.folder or vm.SCRATCH)
    from bench import pause_native  # noqa: PLC0415 - see above

    return lambda options: pause_native.measure(count(options), options.only)


if __name__ == "__main__":
    sys.exit(main())
