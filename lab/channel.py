"""The way commands get into the guest: SSH over one shared connection.

One connection is made at boot and multiplexed, because a handshake is expensive in an emulated machine and
a session on an open connection is not. What is kept true: a command's exit code is its own; it runs in a
cgroup of its own, so that it can be killed with everything it started; its environment is made here, not
inherited from a login.
"""

import contextlib
import itertools
import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from lab.errors import CommandFailed, LabError
from lab.host import tail
from lab.paths import CHECKOUT, GUEST_SCRIPTS, cache_dir, results_dir

_PASSED_ON = ("LANG", "LC_ALL", "TERM", "COLUMNS", "PYTEST_ADDOPTS", "CI")
_PASSED_ON_PREFIXES = ("LAB_", "CSI_VDUSE_", "VDUSE_")
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Completed:
    """A command that ended, and what it printed."""

    argv: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str

    def check(self) -> None:
        """Raise CommandFailed, with the end of the output, unless the exit code is 0."""
        if self.returncode != 0:
            end = (self.stdout[-3000:] + self.stderr[-3000:]).strip()
            raise CommandFailed(
                f"`{shlex.join(self.argv)}` ended with {self.returncode} in the guest:\n{end}"
            )


@dataclass(frozen=True)
class Command:
    """A command that was started; `process` is the ssh client that stands for it on the host."""

    argv: tuple[str, ...]
    process: subprocess.Popen[str]
    channel: "Channel"
    group: str

    def kill(self, timeout_s: float = 60) -> bool:
        """Kill it with everything that it started; False when the guest did not do it in time."""
        killed = self.channel.kill_group(self.group, timeout_s)
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()
        return killed


class Channel:
    """A shared SSH connection to one guest, described by a configuration file."""

    LOST = 255
    """What ssh answers when the connection fails; a command may answer the same, so look before believing."""

    _numbers = itertools.count()

    def __init__(self, config: Path) -> None:
        self._config = config
        self._log = config.with_name("ssh.log")

    @classmethod
    def create(cls, folder: Path, sockets: Path, reached: Mapping[str, str]) -> "Channel":
        """Write the configuration for a guest whose keys are in `folder`.

        sockets: where the socket goes; reached: options that say where the guest's server is.
        """
        known = folder / "known_hosts"
        known.write_text("guest " + " ".join((folder / "host_key.pub").read_text().split()[:2]) + "\n")
        settings = {
            **reached,
            "HostKeyAlias": "guest",
            "User": "root",
            "IdentityFile": folder / "id",
            "IdentitiesOnly": "yes",
            "IdentityAgent": "none",
            "UserKnownHostsFile": known,
            "GlobalKnownHostsFile": "/dev/null",
            "StrictHostKeyChecking": "yes",
            "BatchMode": "yes",
            "LogLevel": "ERROR",
            "ControlPath": sockets / "ssh",
            "ServerAliveInterval": 15,
            "ServerAliveCountMax": 20,
        }
        config = folder / "ssh_config"
        config.write_text("Host guest\n" + "".join(f"  {key} {value}\n" for key, value in settings.items()))
        return cls(config)

    def open(self, timeout_s: float) -> None:
        """Make the shared connection, in a few attempts: a busy host can be too slow for a handshake.

        Raises LabError when the guest's server does not let us in.
        """
        attempts = 4
        for _ in range(attempts):
            if self._connect(timeout_s / attempts):
                return
        raise LabError(f"the guest's SSH server did not let us in: {tail(self._log, 5)}")

    def _connect(self, timeout_s: float) -> bool:
        argv = self._ssh("-M", "-f", "-N", "-o", f"ConnectTimeout={max(1, int(timeout_s))}")
        quiet = subprocess.DEVNULL
        with self._log.open("ab") as log, contextlib.suppress(subprocess.TimeoutExpired):
            # A session of its own: it must survive our terminal's Ctrl-C, and us.
            done = subprocess.run(
                argv,
                stdin=quiet,
                stdout=quiet,
                stderr=log,
                timeout=timeout_s,
                check=False,
                start_new_session=True,
            )
            return done.returncode == 0
        return False

    def close(self) -> None:
        """End the shared connection and remove its socket."""
        if self._config.exists():
            self._quietly(["-O", "exit"], [], timeout_s=10)
            for line in self._config.read_text().splitlines():
                if line.split()[0] == "ControlPath":
                    shutil.rmtree(Path(line.split(maxsplit=1)[1]).parent, ignore_errors=True)

    def start(
        self,
        argv: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdin: bool = False,
        inherit: bool = False,
        terminal: bool = False,
    ) -> "Command":
        """Start a command, its output on pipes.

        cwd: where in the guest; env: added to the usual environment; stdin: its input is a pipe too, not
        nothing; inherit: it gets our own input, output and error instead; terminal: it gets a terminal.
        """
        group = f"{os.getpid()}-{next(self._numbers)}"
        words = [
            str(GUEST_SCRIPTS / "exec.sh"),
            group,
            str(cwd),
            "env",
            "-i",
            *_words(environment(env)),
            *argv,
        ]
        sink = None if inherit else subprocess.PIPE
        process = subprocess.Popen(
            [*self._ssh("-tt" if terminal else "-T"), shlex.join(words)],
            stdin=None if inherit else subprocess.PIPE if stdin else subprocess.DEVNULL,
            stdout=sink,
            stderr=sink,
            text=True,
            errors="replace",
        )
        return Command(tuple(argv), process, self, group)

    def kill_group(self, group: str, timeout_s: float) -> bool:
        """Kill everything in a command's cgroup; False when the guest did not do it in time."""
        path = f"/sys/fs/cgroup/lab/{group}"
        return self._quietly(["-T"], [f"test ! -d {path} || echo 1 > {path}/cgroup.kill"], timeout_s) == 0

    def answers(self, timeout_s: float) -> bool:
        """Whether the guest runs a trivial command in time."""
        return self._quietly(["-T"], ["true"], timeout_s) == 0

    def _quietly(self, options: Sequence[str], command: Sequence[str], timeout_s: float) -> int | None:
        argv = [*self._ssh(*options), *command]
        try:
            done = subprocess.run(
                argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s, check=False
            )
        except subprocess.TimeoutExpired:
            return None
        return done.returncode

    def _ssh(self, *options: str) -> list[str]:
        return ["ssh", "-F", str(self._config), *options, "guest"]


def environment(extra: Mapping[str, str] | None) -> dict[str, str]:
    """A command's whole environment: the host's path and terminal, what is ours, and `extra`."""
    kept = {k: v for k, v in os.environ.items() if k in _PASSED_ON or k.startswith(_PASSED_ON_PREFIXES)}
    path = dict.fromkeys(f"{CHECKOUT}/.venv/bin:{os.environ.get('PATH', '')}:{_SYSTEM_PATH}".split(":"))
    fixed = {
        "HOME": "/root",
        "PATH": ":".join(p for p in path if p),
        "LAB": "host" if os.environ.get("LAB") == "host" else "guest",
        "LAB_RESULTS": str(results_dir()),
        "CSI_VDUSE_CACHE": str(cache_dir()),
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    return {"TERM": "dumb", "LANG": "C.UTF-8", **kept, **fixed, **(extra or {})}


def _words(variables: Mapping[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in variables.items()]
