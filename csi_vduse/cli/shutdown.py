"""`csi-vduse shutdown`: detach what nobody uses, and keep the rest from holding the node's shutdown up."""

from __future__ import annotations

import argparse
import asyncio
from pathlib import Path

from csi_vduse.cli.options import Subcommands
from csi_vduse.cli.volume import connected_agent, show_rows
from csi_vduse.config import DEFAULT_RUN_DIR

_TIMEOUT_S = 30.0


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("shutdown", help=__doc__.partition(": ")[2])
    parser.add_argument(
        "--timeout", type=float, default=_TIMEOUT_S, metavar="S", help="for all detaches together"
    )
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="of the agent")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda options: asyncio.run(_run(options)))


async def _run(options: argparse.Namespace) -> int:
    async with connected_agent(options) as agent:
        kept = await agent.shutdown(options.timeout)
    show_rows(options, [{"volume": volume_id, "kept": why} for volume_id, why in kept.items()])
    return 0
