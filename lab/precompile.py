"""Compiles Python natively for the guest, which reads the host's `__pycache__` but is slow at filling it.

What is kept true: it changes nothing but caches, and its failure never fails a run.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.errors import LabSetupError
from lab.host import run
from lab.paths import CHECKOUT

_PACKAGES = ("csi_vduse", "lab", "tests")
_LIMIT_S = 120.0


def precompile(tests: Sequence[str] = ()) -> None:
    """Fill the byte-code caches of the checkout, and pytest's own for the given tests by collecting them.

    pytest rewrites test modules and plugins before it compiles them, so it has caches of its own.
    """
    writing = {"PYTHONDONTWRITEBYTECODE": ""}
    packages = [p for p in _PACKAGES if (CHECKOUT / p).is_dir()]
    with contextlib.suppress(LabSetupError):
        run(
            [sys.executable, "-m", "compileall", "-q", *packages],
            timeout_s=_LIMIT_S,
            cwd=CHECKOUT,
            env=writing,
        )
    if tests:
        collect = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--collect-only", "-q", *tests]
        with contextlib.suppress(LabSetupError):
            run(collect, timeout_s=_LIMIT_S, cwd=CHECKOUT, env=writing)


def named_tests(command: Sequence[str]) -> list[str]:
    """The test files and folders that a pytest command line names; none if it is something else."""
    if not any(Path(word).name in ("pytest", "py.test") for word in command[:4]):
        return []
    paths = (word.split("::")[0] for word in command[1:] if not word.startswith("-"))
    return [path for path in paths if path.startswith("tests") and (CHECKOUT / path).exists()]
