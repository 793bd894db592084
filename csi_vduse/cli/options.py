"""Options that several subcommands share, so that they read and default the same everywhere."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from csi_vduse import log
from csi_vduse.agent.agent import default_queues
from csi_vduse.agent.model import AttachSpec
from csi_vduse.config import DEFAULT_RUN_DIR, AgentConfig, parse_size
from csi_vduse.dataplane import nbd_config, nbd_uri
from csi_vduse.dataplane.backend_spec import (
    BackendSpec,
    FileBackend,
    NbdBackend,
    NullBackend,
    VhostUserBackend,
)
from csi_vduse.dataplane.config_space import SECTOR_BYTES
from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.errors import InvalidArgument
from csi_vduse.vdpa.model import Bus

T = TypeVar("T")
_SERVER_TIMEOUT_S = 10.0
Subcommands = Any  # argparse keeps the type of add_subparsers' result to itself


def option(parse: Callable[[str], T]) -> Callable[[str], T]:
    """Make a parser of ours an argparse type: its error text becomes the usage error's."""

    def convert(text: str) -> T:
        try:
            return parse(text)
        except InvalidArgument as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


def add_agent_options(parser: argparse.ArgumentParser) -> None:
    """Options of the agent's part in `agent` and `standalone`."""
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="on tmpfs: sockets and records")
    parser.add_argument("--metrics-address", metavar="HOST:PORT", help="serve Prometheus metrics there")
    parser.add_argument(
        "--max-volumes", type=int, default=0, help="attachments on this node; 0: as many as it can serve"
    )
    parser.add_argument(
        "--take-over",
        action="store_true",
        help="take the place of the agent that has the run directory, and hand over its workers",
    )
    parser.add_argument(
        "--ready-file",
        type=Path,
        metavar="PATH",
        help="made when ready, workers taken over; removed at start",
    )


def agent_config(options: argparse.Namespace) -> AgentConfig:
    """Read what add_agent_options added."""
    return AgentConfig(
        run_dir=options.run_dir.absolute(),
        max_volumes=options.max_volumes,
        metrics_address=options.metrics_address,
        take_over=options.take_over,
        ready_file=options.ready_file,
    )


def add_device_options(parser: argparse.ArgumentParser) -> None:
    """Options that describe a device and what it serves."""
    parser.add_argument("--bus", type=Bus, choices=list(Bus), default=Bus.VIRTIO)
    parser.add_argument("--backend", required=True, metavar="file:PATH|NBD-URI|vhost-user:SOCKET|null:SIZE")
    parser.add_argument(
        "--device",
        choices=["block", "net"],
        default="block",
        help="net: a network card, of vhost-user:SOCKET",
    )
    parser.add_argument("--queues", type=int, default=0, help="0: a default for this machine")
    parser.add_argument("--queue-size", type=int, default=0, help="a power of two; 0: the default")
    parser.add_argument("--block-size", type=int, default=0, help="bytes; 0: 512")
    parser.add_argument("--read-only", action="store_true")
    parser.add_argument("--packed", action="store_true", help="offer packed virtqueues to the driver")
    add_throttle_options(parser)


def add_throttle_options(parser: argparse.ArgumentParser) -> None:
    """Options that say how fast a volume may be."""
    parser.add_argument("--iops", type=int, help="requests per second; 0: no limit")
    parser.add_argument(
        "--bandwidth", type=option(parse_size), metavar="SIZE", help="bytes per second; 0: no limit"
    )
    parser.add_argument(
        "--burst-seconds", type=float, metavar="S", help="an idle volume saves up its limits for so long"
    )


def throttle_of(options: argparse.Namespace, before: Throttle = UNLIMITED) -> Throttle:
    """Read what add_throttle_options added; what was not given stays as before.

    Raises:
        InvalidArgument: a value out of range.
    """
    return Throttle(
        iops=before.iops if options.iops is None else options.iops,
        bytes_per_s=before.bytes_per_s if options.bandwidth is None else options.bandwidth,
        burst_s=before.burst_s if options.burst_seconds is None else options.burst_seconds,
    )


def attach_spec(volume_id: str, options: argparse.Namespace) -> AttachSpec:
    """Read what add_device_options added.

    Raises:
        InvalidArgument: as `throttle_of`, `parse_backend` and `usable_bytes`.
        VduseError: a server does not answer, or not as it should; csi_vduse/dataplane/nbd_config.py.
    """
    backend, size_bytes = parse_backend(options.backend)
    if options.device == "net":
        return AttachSpec(volume_id, backend, 0, bus=options.bus, is_network=True)
    said_bytes = size_bytes
    if isinstance(backend, NbdBackend):
        found = nbd_config.probe(backend, timeout_s=_SERVER_TIMEOUT_S)
        size_bytes, said_bytes = found.size_bytes, found.said_bytes
    queues, block_size_bytes = options.queues, options.block_size
    if isinstance(backend, VhostUserBackend):
        offer = frontend.probe(backend.socket)
        size_bytes = said_bytes = offer.capacity_bytes
        queues = queues or min(default_queues(), offer.queues)
        block_size_bytes = block_size_bytes or offer.block_size_bytes
    return AttachSpec(
        volume_id=volume_id,
        backend=backend,
        capacity_bytes=usable_bytes(size_bytes, block_size_bytes or SECTOR_BYTES, said_bytes=said_bytes),
        bus=options.bus,
        read_only=options.read_only,
        queues=queues,
        queue_size=options.queue_size,
        block_size_bytes=block_size_bytes,
        packed=options.packed,
        throttle=throttle_of(options),
    )


def parse_backend(text: str) -> tuple[BackendSpec, int]:
    """Return the backend and its size in bytes: 0 where its server knows it.

    text: `file:PATH`, `null:SIZE`, an NBD URI, or `vhost-user:SOCKET`, perhaps with `,without-flush` or `,mediated`.

    Raises:
        InvalidArgument: none of them, or the file cannot be looked at.
    """
    kind, _, rest = text.partition(":")
    if kind.lower().startswith("nbd"):
        return NbdBackend(*nbd_uri.parse_with_tls(text)), 0
    if kind == "vhost-user" and rest:
        socket, *words = rest.split(",")
        if set(words) <= {"without-flush", "mediated"}:
            flags = {word.replace("-", "_"): True for word in words}
            return VhostUserBackend(Path(socket).absolute(), **flags), 0
    if kind == "null" and rest:
        return NullBackend(), parse_size(rest)
    if kind == "file" and rest:
        path = Path(rest).absolute()
        try:
            with path.open("rb") as file:
                return FileBackend(path), file.seek(0, 2)
        except OSError as error:
            raise InvalidArgument(f"backend file {path}: {error.strerror}") from error
    raise InvalidArgument(f"backend {text!r} is not file:PATH, null:SIZE, vhost-user:SOCKET or an NBD URI")


def usable_bytes(size_bytes: int, block_size_bytes: int, *, said_bytes: int) -> int:
    """Return how much of a backend whole blocks of a device can serve; the log says what is left out.

    Args:
        size_bytes: what whole blocks of the backend have.
        block_size_bytes: of the device.
        said_bytes: all that the backend has.

    Raises:
        InvalidArgument: nothing.
    """
    usable = size_bytes // block_size_bytes * block_size_bytes
    if not usable:
        raise InvalidArgument(
            f"the backend has {said_bytes} bytes, and a block has {block_size_bytes}",
            hint="make it larger, or take smaller blocks",
        )
    if usable != said_bytes:
        log.get().warning(
            "the end of the backend is left out: it is no whole block",
            backend_bytes=said_bytes,
            left_out_bytes=said_bytes - usable,
        )
    return usable
