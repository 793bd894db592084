"""`csi-vduse standalone`: controller, node plugin and agent of one host, with a registry in a directory."""

from __future__ import annotations

import argparse
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import TYPE_CHECKING

from csi_vduse.cli.options import Subcommands, add_agent_options, agent_config
from csi_vduse.cli.processes import run_under_spawner
from csi_vduse.config import DEFAULT_STATE_DIR, StandaloneConfig, parse_endpoint, parse_pools

if TYPE_CHECKING:
    from csi_vduse.agent.client import AgentClient
    from csi_vduse.agent.process import Companion


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("standalone", help=__doc__.partition(": ")[2])
    parser.add_argument("--endpoint", required=True, metavar="unix:///PATH", help="where CSI is served")
    parser.add_argument("--node-id", required=True)
    parser.add_argument("--state-dir", type=Path, default=DEFAULT_STATE_DIR, help="survives a reboot")
    parser.add_argument(
        "--pool",
        action="append",
        default=[],
        metavar="NAME=KIND:PLACE",
        help="repeatable: file:DIR, nbd:ADDRESS",
    )
    parser.add_argument(
        "--peer-node",
        action="append",
        default=[],
        metavar="ID",
        help="another node that volumes may be published to",
    )
    add_agent_options(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run until SIGTERM."""
    parse_endpoint(options.endpoint)
    config = StandaloneConfig(
        endpoint=options.endpoint,
        node_id=options.node_id,
        state_dir=options.state_dir.absolute(),
        pools=parse_pools(options.pool),
        agent=agent_config(options),
        peer_nodes=tuple(options.peer_node),
    )
    return run_under_spawner(config.agent, lambda: _services(config))


def _services(config: StandaloneConfig) -> Companion:
    from csi_vduse.metrics import observe_rpc  # noqa: PLC0415 - in the child only, see processes.py
    from csi_vduse.services.standalone import serving  # noqa: PLC0415

    def serve(agent: AgentClient) -> AbstractAsyncContextManager[None]:
        return serving(config, agent, observe=observe_rpc)

    return serve
