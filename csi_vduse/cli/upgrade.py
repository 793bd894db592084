"""`csi-vduse upgrade`: give volumes new workers, of the release that the agent runs, without stopping their I/O."""

from __future__ import annotations

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csi_vduse.cli.options import Subcommands
from csi_vduse.cli.volume import connected_agent, show_rows
from csi_vduse.config import DEFAULT_RUN_DIR
from csi_vduse.errors import VduseError

if TYPE_CHECKING:
    from csi_vduse.agent.client import AgentClient
    from csi_vduse.agent.model import Attachment


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("upgrade", help=__doc__.partition(": ")[2])
    parser.add_argument(
        "--volume", action="append", default=[], metavar="ID", help="only this one; repeatable"
    )
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="of the agent")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda options: asyncio.run(_run(options)))


async def _run(options: argparse.Namespace) -> int:
    """Hand the volumes over, one after the other; 1 if one of them still has its old worker."""
    async with connected_agent(options) as agent:
        attachments = [
            each for each in await agent.list() if not options.volume or each.volume_id in options.volume
        ]
        rows = [await _hand_over(agent, attachment) for attachment in attachments]
    missing = set(options.volume) - {each.volume_id for each in attachments}
    for volume_id in sorted(missing):
        print(f"csi-vduse: volume {volume_id} is not attached on this node", file=sys.stderr)
    show_rows(options, rows)
    return 1 if missing or any(row["problem"] for row in rows) else 0


async def _hand_over(agent: AgentClient, before: Attachment) -> dict[str, Any]:
    row: dict[str, Any] = {
        "volume": before.volume_id,
        "old_worker": f"{before.worker_pid} ({before.worker_version})",
        "worker": "",
        "pause_s": None,
        "problem": "",
    }
    try:
        done = await agent.handover(before.volume_id)
    except VduseError as error:
        return row | {"problem": str(error)}
    after = done.attachment
    return row | {
        "worker": f"{after.worker_pid} ({after.worker_version})",
        "pause_s": round(done.pause_s, 4),
    }
