"""The program `csi-vduse`: which subcommand, with which options; no logic.

Each subcommand is a file that adds its parser and names a function to run. Heavy modules (grpc, rich) are
imported inside those functions: a program that only prints its help, or forks workers, need not pay for them.
"""

from __future__ import annotations

import argparse
import sys

from csi_vduse import __version__, log
from csi_vduse.cli import (
    agent,
    cni,
    controller,
    doctor,
    export,
    node,
    shutdown,
    standalone,
    storage_server,
    upgrade,
    volume,
    worker,
)
from csi_vduse.errors import VduseError


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return its exit code: 0 good, 1 an error that was printed, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="csi-vduse", description="Kubernetes volumes as VDUSE devices.")
    parser.add_argument("--version", action="version", version=f"csi-vduse {__version__}")
    parser.add_argument("--log-format", choices=("text", "json"), default="text")
    parser.add_argument("--log-level", choices=("DEBUG", "INFO", "WARNING", "ERROR"), default="INFO")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for module in (
        standalone,
        controller,
        node,
        agent,
        storage_server,
        export,
        volume,
        upgrade,
        shutdown,
        cni,
        doctor,
        worker,
    ):
        module.add_parser(subcommands)
    options = parser.parse_args(argv)
    log.configure(log_format=options.log_format, level=options.log_level, component=options.command)
    try:
        code: int = options.run(options)
    except VduseError as error:
        print(f"csi-vduse: {error}", file=sys.stderr)
        return 1
    except PermissionError as error:
        print(f"csi-vduse: {error.filename}: {error.strerror} (run as root)", file=sys.stderr)
        return 1
    return code
