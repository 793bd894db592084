"""The laboratory at the command line: `python -m lab --help`.

Exit codes: the command's own; 124 when it was killed for taking too long; 125 when the laboratory itself
failed (no kernel, boot, panic, hang).
"""

import argparse
import os
import signal
import subprocess
import sys

from lab import kernel as kernels
from lab import rte_vhost, uml_kernel, vhost_client, virtiofsd
from lab.errors import CommandTimeout, LabError
from lab.host import say
from lab.local import LocalMachine
from lab.machine import Machine
from lab.precompile import named_tests, precompile

TIMED_OUT = 124
FAILED = 125


def main(words: list[str] | None = None) -> int:
    """Do what the command line says; returns the exit code."""
    options = _parser().parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that the machine is ended properly
    try:
        return int(options.action(options))
    except CommandTimeout as error:
        say(str(error))
        return TIMED_OUT
    except LabError as error:
        say(f"{type(error).__name__}: {error}")
        return FAILED
    except KeyboardInterrupt:
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description=(__doc__ or "").splitlines()[0])
    actions = parser.add_subparsers(required=True, metavar="ACTION")

    def action(name: str, text: str, function: object) -> argparse.ArgumentParser:
        sub = actions.add_parser(name, help=text, description=text)
        sub.set_defaults(action=function)
        return sub

    def add_machine_options(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--memory", default="4G")
        sub.add_argument("--cpus", type=int, default=2)
        sub.add_argument(
            "--disk-bytes", type=int, default=0, help="size of a blank SCSI disk (default: none)"
        )
        sub.add_argument(
            "--scratch-bytes", type=int, default=2 << 30, help="size of the tmpfs on /mnt/scratch"
        )

    def add_command(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("--timeout", type=float, metavar="SECONDS", help="kill the command after that time")
        sub.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
        sub.add_argument("command", nargs="+", metavar="CMD", help="the command, after `--`")

    sub = action("run", "boot a machine, run one command in it, end it", _run)
    add_machine_options(sub)
    add_command(sub)
    sub = action("shell", "boot a machine for an interactive shell", _shell)
    add_machine_options(sub)
    for name, text, function in (
        ("up", "boot a machine and leave it running", _up),
        ("exec", "run a command in the running machine", _exec),
        ("down", "end the running machine", _down),
        ("console", "show the kernel's log of the running machine", _console),
    ):
        sub = action(name, text, function)
        sub.add_argument("--name", default="dev", help="which machine (default: dev)")
        if name == "up":
            add_machine_options(sub)
        elif name == "exec":
            add_command(sub)
    action("kernel", "get the kernel and print its release and path", _kernel)
    sub = action(
        "prepare", "get everything that a machine needs, so that later boots are offline and quick", _prepare
    )
    sub.add_argument("--all", action="store_true", help="build user-mode Linux too: some minutes, once")
    return parser


def _is_local() -> bool:
    """Whether commands run right here: on a host that has VDUSE itself, or in a guest already."""
    return os.environ.get("LAB") in ("host", "guest")


def _machine(options: argparse.Namespace, name: str | None = None) -> Machine:
    return Machine(
        name,
        memory=options.memory,
        cpus=options.cpus,
        disk_bytes=options.disk_bytes,
        scratch_bytes=options.scratch_bytes,
    )


def _stream(machine: Machine | LocalMachine, options: argparse.Namespace) -> int:
    env = dict(pair.split("=", 1) for pair in options.env)
    return machine.stream(options.command, timeout_s=options.timeout, env=env)


def _run(options: argparse.Namespace) -> int:
    precompile(named_tests(options.command))
    with LocalMachine() if _is_local() else _machine(options) as machine:
        say(f"{machine.name} booted in {machine.boot_s:.1f} s")
        return _stream(machine, options)


def _shell(options: argparse.Namespace) -> int:
    with LocalMachine() if _is_local() else _machine(options) as machine:
        say(f"{machine.name} booted in {machine.boot_s:.1f} s")
        return machine.stream(["bash", "-l"], terminal=sys.stdin.isatty())


def _up(options: argparse.Namespace) -> int:
    machine = _machine(options, options.name)
    machine.boot()
    say(f"{machine.name} booted in {machine.boot_s:.1f} s; its kernel's log: {machine.console_log}")
    machine.detach()
    return 0


def _exec(options: argparse.Namespace) -> int:
    precompile(named_tests(options.command))
    return _stream(LocalMachine() if _is_local() else Machine.find(options.name), options)


def _down(options: argparse.Namespace) -> int:
    Machine.find(options.name).stop()
    return 0


def _console(options: argparse.Namespace) -> int:
    return subprocess.call(["cat", str(Machine.find(options.name).console_log)])


def _kernel(_options: argparse.Namespace) -> int:
    kernel = kernels.obtain()
    print(kernel.release, kernel.image)
    return 0


def _prepare(options: argparse.Namespace) -> int:
    virtiofsd.obtain()
    vhost_client.obtain()
    rte_vhost.obtain()
    if options.all:
        uml_kernel.obtain()
    return _kernel(options)


if __name__ == "__main__":
    sys.exit(main())
