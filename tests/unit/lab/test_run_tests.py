"""What `make test` does with its parts: their order, what runs side by side, and what a failure ends."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.paths import CHECKOUT

MAKEFILE = """
first: ; @echo first >>log
beside: ; @until grep -q second log; do sleep 0.01; done; echo beside >>log
second: ; @grep -q first log && echo second >>log
broken: ; @echo what is wrong; false
large: ; @echo large >>log
hangs: ; @echo waits for nothing; sleep 600
"""
PARTS = """
[first]
cores = 1
budget_s = 60
[beside]
cores = 1
needs = ["first"]
budget_s = 60
[second]
cores = 1
needs = ["first"]
budget_s = 0
"""
LAST = """
[large]
cores = 9
budget_s = 60
"""
BROKEN = """
[broken]
cores = 9
budget_s = 60
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "Makefile").write_text(MAKEFILE)
    (tmp_path / "tests").mkdir()
    return tmp_path


def run(folder: Path, parts: str) -> subprocess.CompletedProcess[str]:
    (folder / "tests/parts.toml").write_text(parts)
    command = [sys.executable, str(CHECKOUT / "tools/run_tests.py"), "--results", str(folder)]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)


def test_parts_run_after_what_they_need_beside_what_leaves_them_a_processor(folder: Path):
    done = run(folder, PARTS + LAST)
    assert done.returncode == 0, done.stdout
    assert (folder / "log").read_text().split() == ["first", "second", "beside", "large"]


def test_nothing_is_started_after_a_failure_and_its_output_is_shown(folder: Path):
    done = run(folder, PARTS + BROKEN + LAST)
    assert done.returncode == 1
    assert "what is wrong" in done.stdout
    assert "failed: broken" in done.stdout
    assert "large" not in (folder / "log").read_text()


def test_a_part_past_its_budget_is_named_and_the_slowest_tests_are_shown(folder: Path):
    (folder / "Makefile").write_text(
        MAKEFILE
        + 'slow: ; @echo \'<testsuite><testcase classname="c" name="n" time="7.25"/></testsuite>\' >a.xml\n'
    )
    done = run(folder, PARTS.replace("budget_s = 0", "budget_s = 0.000001") + LAST.replace("large", "slow"))
    assert done.returncode == 0, done.stdout
    assert "7.2  c::n" in done.stdout
    assert "1 passed, 0 failed, 0 skipped" in done.stdout
    warned = [line for line in done.stdout.splitlines() if "past its budget" in line]
    assert [line.split()[2] for line in warned] == ["second"]


def test_a_part_that_hangs_is_ended_with_all_that_it_started_and_its_output_is_shown(folder: Path):
    done = run(folder, BROKEN.replace("broken", "hangs").replace("60", "0.1"))
    assert done.returncode == 1
    assert "waits for nothing" in done.stdout
    assert "hangs is ended by SIGINT" in done.stdout
    assert "failed: hangs" in done.stdout
