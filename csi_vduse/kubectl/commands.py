"""The subcommands of `kubectl vduse`: read objects, decide (checks.py, rates.py), print tables."""

from __future__ import annotations

import argparse
import asyncio
import datetime as dt
import json
import sys
import time
from dataclasses import asdict
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from csi_vduse.errors import NotFound, PermissionDenied, Unavailable, VduseError
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.resources import (
    NODES,
    PERSISTENT_VOLUMES,
    PODS,
    SNAPSHOTS,
    VOLUMES,
    Object,
    is_going,
    name_of,
)
from csi_vduse.kubectl.checks import Cluster, Finding, examine
from csi_vduse.kubectl.rates import Rate, Reading, rates, read
from csi_vduse.volumes.kubernetes_objects import quantity, rough_quantity

_PIPE_COLUMNS = 250  # without a terminal nothing is cut off
_COLOURS = {"good": "green", "warning": "yellow", "bad": "red"}
_HEALTH_COLOURS = {"Healthy": "green", "Degraded": "yellow", "Inaccessible": "red"}
_NODE_PODS = "app.kubernetes.io/part-of=csi-vduse,app.kubernetes.io/component=node"
_NODE_PORT = 9808
_POLL_S = 2.0


async def list_volumes(api: ApiServer, options: argparse.Namespace) -> int:
    """Show every volume in a line."""
    found, _ = await api.list(VOLUMES, f"spec.nodeName={options.node}" if options.node else "")
    table = _table("volume", "persistent volume", "capacity", "pool", "node", "state", "device", "health")
    for volume in sorted(found, key=name_of):
        spec, status = volume["spec"], volume.get("status", {})
        attachment, health = status.get("attachment") or {}, status.get("health", {}).get("status", "")
        state = "Deleting" if is_going(volume) else status.get("state") or "Pending"
        table.add_row(
            name_of(volume),
            spec["volumeName"],
            status.get("capacity") or quantity(int(spec["capacityBytes"])),
            spec["pool"],
            attachment.get("node") or spec.get("nodeName", ""),
            state,
            attachment.get("device", ""),
            Text(health, style=_HEALTH_COLOURS.get(health, "")),
        )
    _console().print(table)
    return 0


async def inspect(api: ApiServer, options: argparse.Namespace) -> int:
    """Show what is wanted, what is so, and what is wrong, of one volume."""
    found, _ = await api.list(VOLUMES)
    volume = next((one for one in found if options.volume in {name_of(one), one["spec"]["volumeName"]}), None)
    if volume is None:
        raise NotFound(f"volume {options.volume!r} does not exist", hint="kubectl vduse list")
    table = Table(box=None, show_header=False)
    for key, value in _flat({"id": name_of(volume), **volume["spec"], "": None, **volume.get("status", {})}):
        table.add_row(Text(key, style="bold"), value)
    _console().print(table)
    return 0


async def top(api: ApiServer, options: argparse.Namespace) -> int:
    """Show what volumes do, again and again until interrupted."""
    console = _console()
    before, begun_s = await _read_nodes(api), time.monotonic()
    with Live(console=console, auto_refresh=False, screen=console.is_terminal and not options.once) as live:
        while True:
            await asyncio.sleep(options.interval)
            after, now_s = await _read_nodes(api), time.monotonic()
            live.update(_top_view(before, after, now_s - begun_s), refresh=True)
            before, begun_s = after, now_s
            if options.once:
                return 0


async def doctor(api: ApiServer, options: argparse.Namespace) -> int:
    """Show what is wrong; 1 if something keeps volumes from working."""
    findings = examine(await _cluster(api))
    if options.output == "json":
        json.dump([asdict(finding) for finding in findings], sys.stdout, indent=2)
        print()
    else:
        _console().print(_findings_table(findings))
    return 1 if any(finding.verdict == "bad" for finding in findings) else 0


async def upgrade(api: ApiServer, options: argparse.Namespace) -> int:
    """Show the releases of every node; 1 if one is not what it should be, after waiting as long as asked."""
    until_s = time.monotonic() + options.wait
    while True:
        nodes, _ = await api.list(NODES)
        behind = [node for node in nodes if set(_versions(node)) != {options.to}]
        if not behind or time.monotonic() >= until_s:
            break
        await asyncio.sleep(_POLL_S)
    table = _table("node", "node plugin", "agent", "")
    for node in sorted(nodes, key=name_of):
        plugin, agent = _versions(node)
        note = "waits for it" if node in behind else "done"
        table.add_row(name_of(node), plugin, agent, Text(note, style="yellow" if node in behind else "green"))
    _console().print(table)
    return 1 if behind else 0


async def unused(api: ApiServer, _options: argparse.Namespace) -> int:
    """Say which volumes are attached; 1 if there are any."""
    found, _ = await api.list(VOLUMES)
    attached = [volume for volume in found if volume.get("status", {}).get("attachment")]
    for volume in attached:
        where = volume["status"]["attachment"]
        print(f"volume {name_of(volume)} ({volume['spec']['volumeName']}) is in use on {where.get('node')}")
    if attached:
        print("csi-vduse is not uninstalled: the I/O of these volumes would end. Stop what uses them first.")
    return 1 if attached else 0


async def _cluster(api: ApiServer) -> Cluster:
    nodes, _ = await api.list(NODES)
    volumes, _ = await api.list(VOLUMES)
    snapshots, _ = await api.list(SNAPSHOTS)
    try:
        persistent_volumes, _ = await api.list(PERSISTENT_VOLUMES)
    except PermissionDenied:  # as in `helm test`; the other checks are as good
        persistent_volumes = []
    return Cluster(dt.datetime.now(dt.UTC), nodes, volumes, snapshots, persistent_volumes)


async def _read_nodes(api: ApiServer) -> dict[str, Reading | str]:
    """Read every node's counters through the API server; a text says why that failed."""
    pods, _ = await api.list(PODS, "status.phase=Running", _NODE_PODS)
    if not pods:
        raise Unavailable("no node plugin runs", hint="kubectl vduse doctor")

    async def one(pod: Object) -> Reading | str:
        namespace = pod["metadata"]["namespace"]
        path = f"/api/v1/namespaces/{namespace}/pods/{name_of(pod)}:{_NODE_PORT}/proxy/metrics"
        try:
            return read(await api.read_text(path))
        except VduseError as error:
            return str(error)

    readings = await asyncio.gather(*(one(pod) for pod in pods))
    return {pod["spec"]["nodeName"]: reading for pod, reading in zip(pods, readings, strict=True)}


def _top_view(before: dict[str, Reading | str], after: dict[str, Reading | str], seconds: float) -> Group:
    table = _table("node", "volume", "", "IOPS", "bytes/s", "median", "99 of 100")
    problems = []
    for node, now in sorted(after.items()):
        earlier = before.get(node, {})
        if isinstance(now, str):
            problems.append(Text(f"{node}: {now}", style="red"))
            continue
        found = rates(earlier if isinstance(earlier, dict) else {}, now, seconds)
        for (volume, operation), rate in sorted(found.items()):
            table.add_row(node, volume, operation, *_rate_cells(rate))
    return Group(table, *problems)


def _rate_cells(rate: Rate) -> tuple[str, str, str, str]:
    return (
        f"{rate.iops:.0f}",
        rough_quantity(int(rate.bytes_per_s)),
        _milliseconds(rate.median_s),
        _milliseconds(rate.p99_s),
    )


def _milliseconds(seconds: float | None) -> str:
    return "" if seconds is None else f"{seconds * 1000:.3g} ms"


def _findings_table(findings: list[Finding]) -> Table:
    table = _table("about", "verdict", "seen", "what to do")
    for finding in findings:
        verdict = Text(finding.verdict, style=_COLOURS[finding.verdict])
        table.add_row(finding.about, verdict, finding.seen, finding.remedy)
    return table


def _versions(node: Object) -> tuple[str, str]:
    status = node.get("status", {})
    return status.get("version", "?"), status.get("agentVersion") or "?"


def _flat(value: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, each in value.items():
        if isinstance(each, dict):
            rows += _flat(each, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", "" if each is None else str(each)))
    return rows


def _table(*columns: str) -> Table:
    return Table(*columns, box=None)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else _PIPE_COLUMNS)
