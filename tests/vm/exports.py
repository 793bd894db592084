"""Exports in the foreground, and the programs that act on disks and file systems."""

from __future__ import annotations

import contextlib
import json
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

START_TIMEOUT_S = 300
TOOL_TIMEOUT_S = 300


@contextlib.contextmanager
def exported(*argv: str | Path) -> Iterator[tuple[Path, subprocess.Popen[str]]]:
    """Run an export; gives its device, and its process, which has to be ended in the body."""
    process = subprocess.Popen(
        ["csi-vduse", "export", *(str(each) for each in argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(START_TIMEOUT_S, process.kill)
    watchdog.start()
    try:
        assert process.stdout is not None
        yield Path(process.stdout.readline().strip()), process
    finally:
        watchdog.cancel()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            assert stream is not None
            stream.close()


def tool(*argv: str | Path, fails: bool = False) -> str:
    """Run a program to its end; it has to succeed, or to fail if that is what is wanted."""
    done = subprocess.run(
        [str(each) for each in argv], capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=False
    )
    assert (done.returncode != 0) is fails, f"{argv}: {done.returncode}\n{done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def fio(target: Path, engine: str, *options: str) -> None:
    """Write random blocks with checksums, then read and check them all."""
    argv = ["fio", "--name=verify", f"--ioengine={engine}", "--direct=1", "--iodepth=16", "--group_reporting"]
    argv += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--output-format=json"]
    done = subprocess.run(
        [*argv, *options, f"--{'directory' if target.is_dir() else 'filename'}={target}"],
        capture_output=True,
        text=True,
        timeout=TOOL_TIMEOUT_S,
        check=False,
        cwd="/tmp",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout[done.stdout.index("{") :])
    assert all(job["error"] == 0 and job["read"]["total_ios"] for job in report["jobs"])
