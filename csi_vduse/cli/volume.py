"""`csi-vduse volume`: make, list, grow, delete volumes over CSI; attach, detach images through the agent.

Tables for people, `--output json` for programs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from csi_vduse.cli.options import (
    Subcommands,
    add_device_options,
    add_throttle_options,
    attach_spec,
    option,
    throttle_of,
)
from csi_vduse.config import DEFAULT_RUN_DIR, AgentConfig, parse_endpoint, parse_size
from csi_vduse.errors import Unavailable, VduseError
from csi_vduse.histogram import quantile_s

if TYPE_CHECKING:
    from csi_vduse.agent.client import AgentClient
    from csi_vduse.agent.model import Attachment
    from csi_vduse.proto import csi_pb2, csi_pb2_grpc

_CALL_TIMEOUT_S = 120.0
_PARAMETERS = ("pool", "bus", "queues", "queueSize", "blockSize", "maxIops", "maxBandwidth", "burstSeconds")
_PIPE_COLUMNS = 250  # without a terminal nothing is cut off


def add_parser(subcommands: Subcommands) -> None:
    """Declare the subcommands."""
    parser = subcommands.add_parser("volume", help="make, list, attach, detach, grow, delete volumes")
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")

    create = _csi_action(actions, "create", "make a volume", _create)
    create.add_argument("--size", type=option(parse_size), required=True, metavar="SIZE")
    for name in _PARAMETERS:
        create.add_argument(f"--{name}", help=f"volume parameter {name}")
    create.add_argument("name", metavar="NAME")
    _csi_action(actions, "list", "list volumes", _list)
    _csi_action(actions, "delete", "delete a volume", _delete).add_argument("volume_id", metavar="VOLUME")
    expand = _csi_action(actions, "expand", "grow a volume; attached or not", _expand)
    expand.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="of the agent")
    expand.add_argument("volume_id", metavar="VOLUME")
    expand.add_argument("size", type=option(parse_size), metavar="SIZE")

    attach = _agent_action(actions, "attach", "attach an image as a device", _attach)
    add_device_options(attach)
    attach.add_argument("volume_id", metavar="VOLUME")
    remove = _agent_action(actions, "detach", "remove a device", _detach)
    remove.add_argument(
        "--force",
        action="store_true",
        help="do not wait for its backend: fail what waits, and take the disk away from its users",
    )
    remove.add_argument("volume_id", metavar="VOLUME")
    throttle = _agent_action(actions, "throttle", "change how fast a device may be, at once", _throttle)
    add_throttle_options(throttle)
    throttle.add_argument("volume_id", metavar="VOLUME")
    inspect = _agent_action(actions, "inspect", "show a device, or all of them", _inspect)
    inspect.add_argument("volume_id", metavar="VOLUME", nargs="?")


def _csi_action(actions: Subcommands, name: str, text: str, act: _CsiAct) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
    parser.add_argument("--endpoint", required=True, metavar="unix:///PATH", help="of `csi-vduse standalone`")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda options: _with_controller(options, act))
    return parser


def _agent_action(actions: Subcommands, name: str, text: str, act: _AgentAct) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = actions.add_parser(name, help=text)
    parser.add_argument("--run-dir", type=Path, default=DEFAULT_RUN_DIR, help="of the agent")
    parser.add_argument("--output", choices=("table", "json"), default="table")
    parser.set_defaults(run=lambda options: asyncio.run(_with_agent(options, act)))
    return parser


_Rows = list[dict[str, Any]]
_CsiAct = Callable[[argparse.Namespace, "csi_pb2_grpc.ControllerStub"], _Rows]
_AgentAct = Callable[[argparse.Namespace, "AgentClient"], Awaitable[_Rows]]


def _with_controller(options: argparse.Namespace, act: _CsiAct) -> int:
    import grpc  # noqa: PLC0415 - see main.py

    from csi_vduse.proto import csi_pb2_grpc  # noqa: PLC0415

    with grpc.insecure_channel(f"unix:{parse_endpoint(options.endpoint)}") as channel:
        try:
            rows = act(options, csi_pb2_grpc.ControllerStub(channel))
        except grpc.RpcError as error:
            raise VduseError(f"{error.code().name}: {error.details()}") from error
    show_rows(options, rows)
    return 0


async def _with_agent(options: argparse.Namespace, act: _AgentAct) -> int:
    async with connected_agent(options) as agent:
        rows = await act(options, agent)
    show_rows(options, rows)
    return 0


@asynccontextmanager
async def connected_agent(options: argparse.Namespace) -> AsyncIterator[AgentClient]:
    """A client of the agent that --run-dir names.

    Raises:
        Unavailable: there is none.
    """
    from csi_vduse.agent.client import AgentClient  # noqa: PLC0415

    config = AgentConfig(run_dir=options.run_dir.absolute())
    if not config.socket_path.exists():
        raise Unavailable(
            f"no agent listens on {config.socket_path}", hint="start `csi-vduse agent`, or give its --run-dir"
        )
    agent = AgentClient(config.socket_path)
    try:
        yield agent
    finally:
        await agent.close()


def _create(options: argparse.Namespace, controller: csi_pb2_grpc.ControllerStub) -> _Rows:
    from csi_vduse.proto import csi_pb2  # noqa: PLC0415

    request = csi_pb2.CreateVolumeRequest(
        name=options.name,
        capacity_range=csi_pb2.CapacityRange(required_bytes=options.size),
        parameters={
            name: getattr(options, name) for name in _PARAMETERS if getattr(options, name) is not None
        },
        volume_capabilities=[
            csi_pb2.VolumeCapability(
                block=csi_pb2.VolumeCapability.BlockVolume(),
                access_mode=csi_pb2.VolumeCapability.AccessMode(
                    mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER
                ),
            )
        ],
    )
    return [_volume_row(controller.CreateVolume(request, timeout=_CALL_TIMEOUT_S).volume)]


def _list(_options: argparse.Namespace, controller: csi_pb2_grpc.ControllerStub) -> _Rows:
    from csi_vduse.proto import csi_pb2  # noqa: PLC0415

    rows: _Rows = []
    token = ""
    while True:
        request = csi_pb2.ListVolumesRequest(starting_token=token)
        answer = controller.ListVolumes(request, timeout=_CALL_TIMEOUT_S)
        rows += [_volume_row(entry.volume) for entry in answer.entries]
        token = answer.next_token
        if not token:
            return rows


def _delete(options: argparse.Namespace, controller: csi_pb2_grpc.ControllerStub) -> _Rows:
    from csi_vduse.proto import csi_pb2  # noqa: PLC0415

    controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=options.volume_id), timeout=_CALL_TIMEOUT_S)
    return []


def _expand(options: argparse.Namespace, controller: csi_pb2_grpc.ControllerStub) -> _Rows:
    from csi_vduse.proto import csi_pb2  # noqa: PLC0415

    request = csi_pb2.ControllerExpandVolumeRequest(
        volume_id=options.volume_id, capacity_range=csi_pb2.CapacityRange(required_bytes=options.size)
    )
    answer = controller.ControllerExpandVolume(request, timeout=_CALL_TIMEOUT_S)
    asyncio.run(_resize_if_attached(options, answer.capacity_bytes))
    return [{"volume": options.volume_id, "capacity_bytes": answer.capacity_bytes}]


async def _resize_if_attached(options: argparse.Namespace, capacity_bytes: int) -> None:
    if not AgentConfig(run_dir=options.run_dir.absolute()).socket_path.exists():
        return
    async with connected_agent(options) as agent:
        if options.volume_id in {each.volume_id for each in await agent.list()}:
            await agent.resize(options.volume_id, capacity_bytes)


async def _attach(options: argparse.Namespace, agent: AgentClient) -> _Rows:
    return [_attachment_row(await agent.attach(attach_spec(options.volume_id, options)))]


async def _detach(options: argparse.Namespace, agent: AgentClient) -> _Rows:
    await agent.detach(options.volume_id, force=options.force)
    return []


async def _throttle(options: argparse.Namespace, agent: AgentClient) -> _Rows:
    before = (await agent.inspect(options.volume_id)).attachment.spec.throttle
    attachment = await agent.throttle(options.volume_id, throttle_of(options, before))
    return [{"volume": attachment.volume_id, **_throttle_row(attachment)}]


async def _inspect(options: argparse.Namespace, agent: AgentClient) -> _Rows:
    if options.volume_id is None:
        return [_attachment_row(each) for each in await agent.list()]
    inspection = await agent.inspect(options.volume_id)
    row = _attachment_row(inspection.attachment)
    row |= _throttle_row(inspection.attachment)
    row |= {"features": hex(inspection.features), "device_status": inspection.device_status}
    if inspection.stats is not None:
        stats = asdict(inspection.stats)
        for operation in stats.pop("operations"):
            if operation["count"]:
                row[operation["operation"]] = {
                    **{key: operation[key] for key in ("count", "bytes", "errors", "latency_sum_s")},
                    **_quantiles_us(operation["latency"], operation["latency_max_s"]),
                }
        if remote := stats.pop("remote"):
            row["remote"] = remote | _quantiles_us(remote.pop("latency"), remote["latency_max_s"])
        row |= {key: value for key, value in stats.items() if key != "volume_id"}
    return [row]


def _quantiles_us(counts: Sequence[int], max_s: float) -> dict[str, float]:
    """What latencies were like, in microseconds."""
    quantiles = {"p50_us": 0.5, "p99_us": 0.99, "p99.9_us": 0.999}
    told = {name: quantile_s(counts, fraction, max_s=max_s) for name, fraction in quantiles.items()}
    return {name: round(seconds * 1e6, 1) for name, seconds in (told | {"max_us": max_s}).items()}


def _volume_row(volume: csi_pb2.Volume) -> dict[str, Any]:
    return {
        "volume": volume.volume_id,
        "capacity_bytes": volume.capacity_bytes,
        **dict(volume.volume_context),
    }


def _attachment_row(attachment: Attachment) -> dict[str, Any]:
    spec = attachment.spec
    return {
        "volume": attachment.volume_id,
        "path": str(attachment.path or ""),
        "bus": str(spec.bus),
        "state": str(attachment.state),
        "reason": attachment.state_reason,
        "capacity_bytes": spec.capacity_bytes,
        "read_only": spec.read_only,
        "queues": spec.queues,
        "worker_pid": attachment.worker_pid,
        "worker_version": attachment.worker_version,
    }


def _throttle_row(attachment: Attachment) -> dict[str, Any]:
    throttle = attachment.spec.throttle
    return {
        "max_iops": throttle.iops,
        "max_bandwidth": throttle.bytes_per_s,
        "burst_seconds": throttle.burst_s,
    }


def show_rows(options: argparse.Namespace, rows: Sequence[dict[str, Any]]) -> None:
    """Print rows as --output says."""
    if options.output == "json":
        json.dump(list(rows), sys.stdout, indent=2)
        print()
        return
    if not rows:
        return
    from rich.console import Console  # noqa: PLC0415 - only tables need it
    from rich.table import Table  # noqa: PLC0415

    table = Table(box=None)
    if len(rows) == 1 and len(rows[0]) > len(_attachment_columns):
        for key, value in rows[0].items():
            table.add_row(key, str(value))
    else:
        for key in rows[0]:
            table.add_column(key)
        for row in rows:
            table.add_row(*(str(value) for value in row.values()))
    Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS).print(table)


_attachment_columns = (
    "volume",
    "path",
    "bus",
    "state",
    "reason",
    "capacity_bytes",
    "read_only",
    "queues",
    "worker_pid",
    "worker_version",
)
