"""`csi-vduse storage-server`: volumes out of one directory, over NBD, or for this machine by vhost-user."""

from __future__ import annotations

import argparse
from pathlib import Path

from csi_vduse.cli.options import Subcommands, option
from csi_vduse.errors import InvalidArgument
from csi_vduse.storage.config import (
    CONTROLLER_NAME,
    DEFAULT_CONTROL_PORT,
    DEFAULT_NBD_PORT,
    Address,
    ServerConfig,
    Tls,
    parse_address,
)
from csi_vduse.storage.model import Format

_RUN_DIR = Path("/run/csi-vduse-storage")


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommand."""
    parser = subcommands.add_parser("storage-server", help=__doc__.partition(": ")[2])
    parser.add_argument("--directory", type=Path, required=True, help="holds the images; must exist")
    parser.add_argument("--run-dir", type=Path, default=_RUN_DIR, help="on tmpfs: sockets")
    parser.add_argument(
        "--control",
        type=option(_control),
        default=Address(path=_RUN_DIR / "control.sock"),
        metavar="HOST:PORT|unix:PATH",
        help="where controllers give orders",
    )
    parser.add_argument(
        "--nbd",
        type=option(_nbd),
        default=Address("127.0.0.1", DEFAULT_NBD_PORT),
        metavar="HOST:PORT|unix:PATH",
        help="where nodes read and write",
    )
    parser.add_argument(
        "--vhost-user",
        type=Path,
        metavar="DIR",
        help="serve workers of this machine by sockets in this directory instead, which is made",
    )
    parser.add_argument(
        "--advertise", type=option(_nbd), metavar="HOST:PORT", help="what nodes are told instead"
    )
    parser.add_argument("--format", choices=[one.value for one in Format], default=Format.RAW.value)
    parser.add_argument("--tls-dir", type=Path, help="has ca-cert.pem, server-cert.pem, server-key.pem")
    parser.add_argument("--no-tls", action="store_true", help="only where nothing leaves this machine")
    parser.add_argument(
        "--node-name",
        action="append",
        default=[],
        metavar="DN",
        help="pattern of certificates that may use exports",
    )
    parser.add_argument(
        "--controller-name",
        action="append",
        default=[],
        metavar="CN",
        help="certificate that may give orders",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    if (options.tls_dir is None) is not options.no_tls:
        raise InvalidArgument(
            "give either --tls-dir DIR or --no-tls", hint="--no-tls works on one machine only"
        )
    if options.vhost_user is not None:
        options.vhost_user = options.vhost_user.absolute()
        options.vhost_user.mkdir(mode=0o700, parents=True, exist_ok=True)
    tls = None
    if options.tls_dir is not None:
        tls = Tls(
            options.tls_dir.absolute(),
            nodes=tuple(options.node_name),
            controllers=tuple(options.controller_name) or (CONTROLLER_NAME,),
        )
    elif options.node_name or options.controller_name:
        raise InvalidArgument("--node-name and --controller-name name certificates, and --no-tls has none")
    config = ServerConfig(
        directory=options.directory.absolute(),
        run_dir=options.run_dir.absolute(),
        control=options.control,
        nbd=options.nbd,
        advertised=options.advertise,
        tls=tls,
        image_format=Format(options.format),
        vhost_user=options.vhost_user,
    )
    from csi_vduse.storage.process import run_storage_server  # noqa: PLC0415 - imports grpc

    return run_storage_server(config)


def _control(text: str) -> Address:
    return parse_address(text, DEFAULT_CONTROL_PORT)


def _nbd(text: str) -> Address:
    return parse_address(text, DEFAULT_NBD_PORT)
