"""`csi-vduse agent`: owner of this node's workers, without CSI."""

from __future__ import annotations

import argparse
import contextlib

from csi_vduse.cli.options import Subcommands, add_agent_options, agent_config
from csi_vduse.cli.processes import run_under_spawner
from csi_vduse.dataplane import jail


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("agent", help=__doc__.partition(": ")[2])
    add_agent_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until SIGTERM, with no more of root's powers than workers, bus and disks need."""
    with contextlib.suppress(
        OSError
    ):  # who is not root has none to give up, and is told so by the first attach
        jail.keep_capabilities(*jail.OF_AGENT)
    return run_under_spawner(agent_config(options))
