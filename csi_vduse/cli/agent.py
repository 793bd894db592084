"""`csi-vduse agent`: owner of this node's workers, without CSI."""

from __future__ import annotations

import argparse

from csi_vduse.cli.options import Subcommands, add_agent_options, agent_config
from csi_vduse.cli.processes import run_under_spawner


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("agent", help=__doc__.partition(": ")[2])
    add_agent_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    return run_under_spawner(agent_config(options))
