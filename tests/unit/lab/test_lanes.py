"""No test of a VDUSE kernel is lost between the lanes."""

import subprocess
import sys

from lab.paths import CHECKOUT

SUITES = ("tests/vm", "tests/chaos/vm")


def collected(lane: str) -> set[str]:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "--collect-only",
        "-q",
        "--lane",
        lane,
    ]
    done = subprocess.run(
        [*command, *SUITES], cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=True
    )
    return {line for line in done.stdout.splitlines() if "::" in line}


def test_each_test_runs_in_one_lane():
    native, emulated = collected("native"), collected("emulated")
    assert not native & emulated
    assert native | emulated == collected("all")
    assert len(native) > 100
    assert len(emulated) > 10
