"""Running the host's own commands, and talking to the person in front of the terminal.

What is kept true: every command has a time limit, and a failed one shows its argv, exit code and last lines.
"""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.errors import LabSetupError


def say(message: str) -> None:
    """Write one line about the laboratory itself to standard error."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str], *, timeout_s: float, cwd: Path | None = None, env: Mapping[str, str] | None = None
) -> str:
    """Run a host command to its end and return its standard output.

    timeout_s: seconds until it is killed; env: variables added to the environment.
    Raises LabSetupError when it cannot be started, fails or takes too long.
    """
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except OSError as error:
        raise LabSetupError(
            f"cannot run {argv[0]}: {error.strerror}; lab/install-deps.sh installs what is needed"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise LabSetupError(f"`{' '.join(argv)}` did not end within {timeout_s:.0f} s") from error
    if done.returncode != 0:
        tail = "\n".join((done.stdout + done.stderr).splitlines()[-15:])
        raise LabSetupError(f"`{' '.join(argv)}` ended with {done.returncode}:\n{tail}")
    return done.stdout


def tail(path: Path, lines: int) -> str:
    """The last lines of a log, control characters removed; an empty string when there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - lines * 400))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    clean = "".join(c for c in text if c.isprintable() or c in "\n\t")
    return "\n".join(clean.splitlines()[-lines:])
