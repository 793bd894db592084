"""The one way to run a program: argument lists, a deadline, and an error that says what happened.

Invariant: no program outlives its deadline because of us. One that cannot be killed (stuck in the kernel)
is left behind after SIGKILL and reported; the caller is never stuck with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from csi_vduse.errors import CommandFailed, DeadlineExceeded, FailedPrecondition

DEFAULT_TIMEOUT_S = 60.0
_TAIL_CHARS = 2000
_KILL_GRACE_S = 2.0


@dataclass(frozen=True)
class Output:
    """What a finished program left: exit code and its standard streams as text."""

    argv: tuple[str, ...]
    exit_code: int
    stdout: str
    stderr: str


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float = DEFAULT_TIMEOUT_S,
    ok_codes: Sequence[int] = (0,),
    env: Mapping[str, str] | None = None,
    stdin: bytes = b"",
    secret: Sequence[str] = (),
) -> Output:
    """Run a program in its own process group and wait for it.

    Args:
        argv: the program and its arguments; never a shell string.
        timeout_s: after this the whole group is killed.
        ok_codes: exit codes that are not errors.
        env: added to the environment, which is made predictable with LC_ALL=C.
        stdin: what the program reads; it never reads from ours.
        secret: words of argv that no error may show.

    Raises:
        CommandFailed: another exit code; carries the last lines of output.
        DeadlineExceeded: the program did not end in time.
        FailedPrecondition: the program is not installed.
    """
    shown = ["***" if word in secret else word for word in argv]
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C", **(env or {})},
            start_new_session=True,
        )
    except FileNotFoundError as error:
        raise FailedPrecondition(f"program {argv[0]!r} not found", hint="install it on this node") from error
    try:
        stdout, stderr = await asyncio.wait_for(process.communicate(stdin), timeout_s)
    except (TimeoutError, asyncio.CancelledError) as error:
        await _kill_group(process)
        if isinstance(error, asyncio.CancelledError):
            raise
        raise DeadlineExceeded(
            f"`{' '.join(shown)}` did not end within {timeout_s:g} s and was killed"
        ) from error
    output = Output(
        tuple(argv),
        process.returncode or 0,
        stdout.decode(errors="replace"),
        stderr.decode(errors="replace"),
    )
    if output.exit_code not in ok_codes:
        raise CommandFailed(shown, output.exit_code, (output.stdout + output.stderr)[-_TAIL_CHARS:])
    return output


async def _kill_group(process: asyncio.subprocess.Process) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(process.wait(), _KILL_GRACE_S)
