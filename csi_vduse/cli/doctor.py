"""`csi-vduse doctor`: what on this host is missing or wrong for the driver, and how to mend it."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

from csi_vduse.cli.options import Subcommands
from csi_vduse.config import DEFAULT_RUN_DIR, parse_pool
from csi_vduse.node.doctor import Finding, examine

_PIPE_COLUMNS = 250  # without a terminal nothing is cut off


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("doctor", help=__doc__.partition(": ")[2])
    parser.add_argument("--pool", action="append", default=[], metavar="NAME=file:DIR", help="check it too")
    parser.add_argument(
        "--plan",
        action="store_true",
        help="print what an agent that starts now would take over, end or remove",
    )
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="of the agent, for --plan")
    parser.add_argument(
        "--vhost-user",
        type=Path,
        action="append",
        default=[],
        metavar="SOCKET",
        help="a server of a disk; it is asked, so nobody may use it meanwhile; repeatable",
    )
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda options: _plan(options) if options.plan else run(options))


def run(options: argparse.Namespace) -> int:
    """Print the findings; 1 if one of them keeps the driver from working."""
    findings = examine(tuple(parse_pool(text) for text in options.pool), tuple(options.vhost_user))
    if options.output == "json":
        json.dump([asdict(finding) for finding in findings], sys.stdout, indent=2)
        print()
    else:
        _print_table(findings)
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


def _plan(options: argparse.Namespace) -> int:
    """Print the steps of recovery; 1 if there is something that an agent leaves alone and people should look at."""
    from csi_vduse.agent.recovery import Report, observe, plan  # noqa: PLC0415 - see main.py
    from csi_vduse.agent.store import Store  # noqa: PLC0415
    from csi_vduse.vdpa.sysfs import Sysfs  # noqa: PLC0415

    steps = plan(observe(Store(options.run_dir.absolute() / "volumes"), Sysfs()))
    if options.output == "json":
        json.dump([str(step) for step in steps], sys.stdout, indent=2)
        print()
    else:
        print("\n".join(str(step) for step in steps) or "nothing to do")
    return 1 if any(isinstance(step, Report) for step in steps) else 0


def _print_table(findings: list[Finding]) -> None:
    from rich.console import Console  # noqa: PLC0415 - only tables need it
    from rich.table import Table  # noqa: PLC0415

    table = Table("check", "verdict", "seen", "what to do", box=None)
    colours = {"good": "green", "warning": "yellow", "bad": "red"}
    for finding in findings:
        verdict = f"[{colours[finding.verdict]}]{finding.verdict}[/]"
        table.add_row(finding.check, verdict, finding.seen, finding.remedy)
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)
