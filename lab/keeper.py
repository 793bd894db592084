"""Stands between the laboratory and virtme-ng, so that no machine outlives whom it was booted for.

Started as `python -m lab.keeper COMMAND...` in a session of its own, its standard input a pipe from the
laboratory. What is kept true: when the pipe closes, however the other end died, the command and all its
children are killed; when a byte comes through it first, the machine is meant to stay and the pipe counts no
more.
"""

import os
import select
import signal
import subprocess
import sys


def main(argv: list[str]) -> int:
    """Run the command until it ends, or until the pipe says that nobody wants it; returns its exit code."""
    # QEMU needs what we were given: the machine's lock, and the tap devices behind its cards.
    command = subprocess.Popen(argv, stdin=subprocess.DEVNULL, close_fds=False)
    ended = os.pidfd_open(command.pid)
    pipe = sys.stdin.fileno()
    if pipe in select.select([pipe, ended], [], [])[0] and not os.read(pipe, 1):
        os.killpg(0, signal.SIGKILL)
    return command.wait()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
