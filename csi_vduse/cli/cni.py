"""`csi-vduse cni`: the CNI plugin; a container runtime calls it, with the request in its environment."""

from __future__ import annotations

import argparse
import os
import sys

from csi_vduse.cli.options import Subcommands


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("cni", help=__doc__.partition(": ")[2])
    parser.set_defaults(run=run)


def run(_options: argparse.Namespace) -> int:
    """Answer one request."""
    from csi_vduse.cni import plugin  # noqa: PLC0415 - see main.py

    code, text = plugin.main(os.environ, sys.stdin.read())
    if text:
        print(text)
    return code
