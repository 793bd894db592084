"""A process in a mount namespace of its own, as monitoring agents with private propagation are."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator


@contextlib.contextmanager
def elsewhere(command: str = "true") -> Iterator[subprocess.Popen[bytes]]:
    """Run a shell command in a new mount namespace, whose mounts are a copy of ours, and keep it while the body runs."""
    process = subprocess.Popen(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{command} && echo; exec cat"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == b"\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)
