"""`csi-vduse node`: the CSI node plugin of a Kubernetes node; registers itself with kubelet, asks an agent."""

from __future__ import annotations

import argparse
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from csi_vduse import DRIVER_NAME
from csi_vduse.cli.options import Subcommands, option
from csi_vduse.config import (
    DEFAULT_RUN_DIR,
    DEFAULT_STATE_DIR,
    NodeConfig,
    check_socket_path,
    parse_endpoint,
    parse_pools,
)

if TYPE_CHECKING:
    from csi_vduse.kube.api import ApiServer


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("node", help=__doc__.partition(": ")[2])
    parser.add_argument("--node-id", required=True, help="the node's name in the Kubernetes API")
    parser.add_argument(
        "--kubelet-dir",
        type=Path,
        default=Path("/var/lib/kubelet"),
        help="as kubelet has it, and here the same",
    )
    parser.add_argument(
        "--endpoint",
        type=option(parse_endpoint),
        metavar="unix:///PATH",
        help=f"where CSI is served, as kubelet sees it; default: KUBELET_DIR/plugins/{DRIVER_NAME}/csi.sock",
    )
    parser.add_argument(
        "--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="the agent's: its socket is there"
    )
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="survives a reboot")
    parser.add_argument(
        "--pool", action="append", default=[], metavar="NAME=file:DIR[?max-hold-seconds=N]", help="repeatable"
    )
    parser.add_argument(
        "--http-address",
        default="0.0.0.0:9808",
        metavar="HOST:PORT",
        help="health and metrics",
    )
    parser.add_argument(
        "--startup-taint", default="", metavar="KEY", help="taint to take off the node once registered"
    )
    parser.add_argument("--kubeconfig", help="default: the pod's service account, else the usual kubeconfig")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    kubelet_dir: Path = options.kubelet_dir.absolute()
    registration = kubelet_dir / "plugins_registry" / f"{DRIVER_NAME}-reg.sock"
    check_socket_path(registration)
    config = NodeConfig(
        node_id=options.node_id,
        endpoint=options.endpoint or kubelet_dir / "plugins" / DRIVER_NAME / "csi.sock",
        registration=registration,
        state_dir=options.state_dir.absolute(),
        agent_socket=options.run_dir.absolute() / "agent.sock",
        pools=parse_pools(options.pool) if options.pool else (),
        http_address=options.http_address,
        startup_taint=options.startup_taint,
    )
    # Slow to import, and for this subcommand only.
    from csi_vduse.agent.client import AgentClient  # noqa: PLC0415
    from csi_vduse.cli.in_cluster import run_until_told  # noqa: PLC0415
    from csi_vduse.metrics import parse_address  # noqa: PLC0415
    from csi_vduse.services.node_plugin import serving  # noqa: PLC0415

    @asynccontextmanager
    async def serve(api: ApiServer) -> AsyncIterator[None]:
        agent = AgentClient(config.agent_socket)
        try:
            async with serving(config, api, agent):
                yield
        finally:
            await agent.close()

    parse_address(options.http_address)
    return run_until_told(serve, options.kubeconfig)
