"""Running the host's own commands, and talking to the person in front of the terminal.

What is kept true: every command has a time limit, at which all that it started is killed; and a failed one shows its
argv, exit code and last lines.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from lab.errors import LabSetupError


def say(message: str) -> None:
    """Write one line about the laboratory itself to standard error."""
    print(f"lab: {message}", file=sys.stderr, flush=True)


def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    attempts: int = 1,
) -> str:
    """Run a host command to its end and return its standard output.

    timeout_s: seconds until it is killed; env: variables added to the environment; attempts: how often it may take too
    long, for what waits for servers elsewhere and goes on where it was.
    Raises LabSetupError when it cannot be started, fails or takes too long.
    """
    for attempt in range(1, attempts + 1):
        try:
            return _run_once(argv, timeout_s, cwd, env)
        except subprocess.TimeoutExpired as error:
            text = f"`{' '.join(argv)}` did not end within {timeout_s:.0f} s"
            if attempt == attempts:
                raise LabSetupError(text) from error
            say(f"{text}; once more")
    raise AssertionError(attempts)


def _run_once(argv: Sequence[str], timeout_s: float, cwd: Path | None, env: Mapping[str, str] | None) -> str:
    try:
        process = subprocess.Popen(
            argv,
            cwd=cwd,
            env={**os.environ, **(env or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            process_group=0,
        )
    except OSError as error:
        raise LabSetupError(
            f"cannot run {argv[0]}: {error.strerror}; lab/install-deps.sh installs what is needed"
        ) from error
    with process:
        try:
            out, err = process.communicate(timeout=timeout_s)
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)  # its children hold the pipes too, and would be waited for
            raise
    if process.returncode != 0:
        last = "\n".join((out + err).splitlines()[-15:])
        raise LabSetupError(f"`{' '.join(argv)}` ended with {process.returncode}:\n{last}")
    return out


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
