"""`csi-vduse controller`: the CSI controller of a Kubernetes cluster; any number run, one leads."""

from __future__ import annotations

import argparse
import os
import secrets
from pathlib import Path

from csi_vduse.cli.options import Subcommands, option
from csi_vduse.config import DEFAULT_STATE_DIR, ControllerConfig, parse_endpoint, parse_pools
from csi_vduse.errors import InvalidArgument
from csi_vduse.volumes.policy import is_shared


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("controller", help=__doc__.partition(": ")[2])
    parser.add_argument("--endpoint", required=True, type=option(parse_endpoint), metavar="unix:///PATH")
    parser.add_argument(
        "--http-address",
        default="0.0.0.0:9809",
        metavar="HOST:PORT",
        help="health and metrics",
    )
    parser.add_argument("--lease-namespace", required=True, help="where the leader's lease is")
    parser.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="NAME=nbd:ADDRESS[?tls=DIR[&node-tls=DIR]]",
        help="one that is on no node; repeatable",
    )
    parser.add_argument(
        "--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="remembers which pool is which"
    )
    parser.add_argument("--kubeconfig", help="default: the pod's service account, else the usual kubeconfig")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    pools = parse_pools(options.pool) if options.pool else ()
    for pool in pools:
        if not is_shared(pool.kind):
            raise InvalidArgument(
                f"pool {pool.name!r} of kind {pool.kind!r} is on a node", hint="give it to `csi-vduse node`"
            )
    config = ControllerConfig(
        endpoint=options.endpoint,
        http_address=options.http_address,
        lease_namespace=options.lease_namespace,
        # A container that restarts in its pod is another process: its host name alone would not do.
        identity=f"{os.uname().nodename}_{secrets.token_hex(4)}",
        pools=pools,
        state_dir=options.state_dir.absolute(),
    )
    # Slow to import, and for this subcommand only.
    from csi_vduse.cli.in_cluster import run_until_told  # noqa: PLC0415
    from csi_vduse.metrics import parse_address  # noqa: PLC0415
    from csi_vduse.services.controller_process import serving  # noqa: PLC0415

    parse_address(options.http_address)
    return run_until_told(lambda api: serving(config, api), options.kubeconfig)
