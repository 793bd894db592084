"""The program `kubectl-vduse`, which kubectl runs as `kubectl vduse`: which subcommand, with which options."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Awaitable, Callable

from csi_vduse import __version__, log
from csi_vduse.errors import VduseError
from csi_vduse.kube.api import ApiServer, connect
from csi_vduse.kubectl import commands

Act = Callable[[ApiServer, argparse.Namespace], Awaitable[int]]


def main(argv: list[str] | None = None) -> int:
    """Run a subcommand; return its exit code: 0 good, 1 something is wrong, 2 wrong usage."""
    parser = argparse.ArgumentParser(prog="kubectl vduse", description="VDUSE volumes of a cluster.")
    parser.add_argument("--version", action="version", version=f"kubectl-vduse {__version__}")
    parser.add_argument("--kubeconfig", help="default: KUBECONFIG, or ~/.kube/config")
    parser.add_argument("--context", help="of the kubeconfig; default: the current one")
    subcommands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    listing = _add(subcommands, "list", "volumes with their state, place and health", commands.list_volumes)
    listing.add_argument("--node", default="", help="of this node only")
    inspect = _add(subcommands, "inspect", "everything about one volume", commands.inspect)
    inspect.add_argument("volume", metavar="VOLUME", help="its id, or the name of its PersistentVolume")
    top = _add(subcommands, "top", "requests, bytes and latencies, live", commands.top)
    top.add_argument("--interval", type=_seconds, default=2.0, metavar="S", help="between two looks")
    top.add_argument("--once", action="store_true", help="show one interval and end")
    doctor = _add(subcommands, "doctor", "what is wrong, and what to do", commands.doctor)
    doctor.add_argument("--output", choices=("table", "json"), default="table")
    upgrade = _add(subcommands, "upgrade", "follow an upgrade: releases by node", commands.upgrade)
    upgrade.add_argument("--to", default=__version__, metavar="VERSION", help="what every node should run")
    upgrade.add_argument("--wait", type=_seconds, default=0.0, metavar="S", help="wait so long for it")
    _add(
        subcommands,
        "unused",
        "succeed if no volume is attached; what helm asks before it uninstalls",
        commands.unused,
    )
    options = parser.parse_args(argv)
    log.configure(level="ERROR", component="kubectl-vduse")
    try:
        return asyncio.run(_run(options))
    except VduseError as error:
        print(f"kubectl vduse: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 0


async def _run(options: argparse.Namespace) -> int:
    api = await connect(options.kubeconfig, options.context)
    try:
        act: Act = options.act
        return await act(api, options)
    finally:
        await api.close()


def _add(
    subcommands: argparse._SubParsersAction[argparse.ArgumentParser], name: str, text: str, act: Act
) -> argparse.ArgumentParser:
    parser = subcommands.add_parser(name, help=text)
    parser.set_defaults(act=act)
    return parser


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < 86400:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds")
    return seconds
