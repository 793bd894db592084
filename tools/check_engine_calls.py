"""Which file of the engine calls which: in no circle, and with a name for each function.

As the linker sees it: each file is compiled by itself, and what it needs and another one has (functions and data, by
`nm`) is a call from the one to the other; a backend's functions that are called through its table alone are not. So every
file can be read, and tested, with those below it in mind and no others. A name that two static functions share is one
that perf, gdb and bpftrace cannot tell.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from csi_vduse.dataplane._build import COMPILE_ARGS

SOURCE = Path(__file__).parent.parent / "csi_vduse/dataplane/src"


def main() -> int:
    """Print what is wrong, or the files by what they call; returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--show", action="store_true", help="print every file and those that it calls, lowest first"
    )
    options = parser.parse_args()
    calls = _calls()
    try:
        order = list(TopologicalSorter(calls).static_order())
    except CycleError as error:
        print(f"engine: files call each other in a circle: {' <- '.join(error.args[1])}", file=sys.stderr)
        return 1
    if shared := [name for name, count in _static_functions().items() if count > 1]:
        print(f"engine: names of several functions: {' '.join(shared)}", file=sys.stderr)
        return 1
    for file in order if options.show else ():
        print(f"{file}: {' '.join(sorted(calls[file]))}")
    return 0


def _static_functions() -> Counter[str]:
    """How often each name is defined; those of headers once."""
    found = re.compile(r"^static (?:inline )?(?:const )?[\w ]+[ *](\w+)\(", re.MULTILINE)
    return Counter(name for file in SOURCE.rglob("*.[ch]") for name in found.findall(file.read_text()))


def _calls() -> dict[str, set[str]]:
    """For each file, those that have what it needs."""
    files = sorted(SOURCE.rglob("*.c"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as threads:
        objects = list(threads.map(lambda file: _compile(file, Path(folder)), files))
    names = [str(file.relative_to(SOURCE)) for file in files]
    owner = {symbol: name for name, (has, _) in zip(names, objects, strict=True) for symbol in has}
    return {
        name: {owner[symbol] for symbol in needs if symbol in owner}
        for name, (_, needs) in zip(names, objects, strict=True)
    }


def _compile(file: Path, folder: Path) -> tuple[set[str], set[str]]:
    """Names that the file has for others, and those that it needs of them."""
    target = folder / f"{'-'.join(file.relative_to(SOURCE).parts)}.o"
    subprocess.run(["cc", *COMPILE_ARGS, "-fno-lto", f"-I{SOURCE}", "-c", "-o", target, file], check=True)
    lines = subprocess.run(["nm", "--extern-only", target], check=True, capture_output=True, text=True).stdout
    words = [line.split() for line in lines.splitlines()]
    return {line[-1] for line in words if line[-2] != "U"}, {line[-1] for line in words if line[-2] == "U"}


if __name__ == "__main__":
    sys.exit(main())
