"""`csi-vduse worker`: one worker on a control socket that its starter passes, for other supervisors."""

from __future__ import annotations

import argparse
import socket
from pathlib import Path

from csi_vduse.cli.options import Subcommands
from csi_vduse.dataplane.worker import run_worker


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser(
        "worker", help="(internal) serve one volume, told what on a control socket"
    )
    parser.add_argument("--control-fd", type=int, required=True, help="connected SOCK_SEQPACKET socket")
    parser.add_argument("--listen", type=Path, required=True, help="path for further control connections")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until told to stop."""
    return run_worker(socket.socket(fileno=options.control_fd), str(options.listen))
