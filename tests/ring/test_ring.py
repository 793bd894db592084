"""Build the ring tests with each sanitizer and run every case of them in a process of its own."""

import fcntl
import os
import re
import subprocess
from pathlib import Path

import pytest

HERE = Path(__file__).parent
BUILD = HERE.parent.parent / ".cache" / "ring-tests"
CASES = sorted(
    name + of_format
    for path in HERE.glob("cases_*.c")
    for kind, name in re.findall(r"^(CASE|BOTH|SPOILED|SPOILED_BOTH)\((\w+)", path.read_text(), re.MULTILINE)
    for of_format in (("", "/packed") if "BOTH" in kind else ("",))
)
SKIPPED = 77


@pytest.fixture(scope="session")
def programs() -> dict[str, Path]:
    BUILD.mkdir(parents=True, exist_ok=True)
    with (BUILD / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two sessions of pytest must not build in one place at once
        made = subprocess.run(
            ["make", "-C", HERE, "-j2", f"BUILD={BUILD}"],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
    assert made.returncode == 0, made.stdout + made.stderr
    return {variant: BUILD / variant / "ring_tests" for variant in ("address", "thread")}


@pytest.mark.parametrize("variant", ["address", "thread"])
@pytest.mark.parametrize("case", CASES)
def test_ring(programs: dict[str, Path], variant: str, case: str, tmp_path: Path) -> None:
    env = {
        **os.environ,
        "TEST_DIRECTORY": str(tmp_path),
        "TSAN_OPTIONS": "halt_on_error=1:second_deadlock_stack=1",
        "ASAN_OPTIONS": "detect_leaks=1:strict_string_checks=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    ran = subprocess.run(
        [programs[variant], case], env=env, capture_output=True, text=True, timeout=120, check=False
    )
    if ran.returncode == SKIPPED:
        pytest.skip(ran.stdout.strip())
    assert ran.returncode == 0, (
        f"{case} with -fsanitize={variant} ended with {ran.returncode}\n{ran.stdout}{ran.stderr}"
    )


def test_every_case_is_listed_by_the_program(programs: dict[str, Path]) -> None:
    listed = subprocess.run(
        [programs["address"]], capture_output=True, text=True, timeout=60, check=True
    ).stdout
    assert sorted(listed.split()) == CASES
