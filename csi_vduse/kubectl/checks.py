"""What `kubectl vduse doctor` finds wrong, from the objects alone. Pure.

A "bad" finding keeps volumes from working; a "warning" does not, yet.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from csi_vduse import DRIVER_NAME, __version__
from csi_vduse.backends import nbd
from csi_vduse.kube.resources import Object, is_going, name_of
from csi_vduse.volumes import kubernetes_objects as objects

SILENT_S = 180.0
# A node removes an image in seconds; what takes longer waits for something.
STUCK_S = 300.0


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong, or that nothing is."""

    about: str
    verdict: Literal["good", "warning", "bad"]
    seen: str
    remedy: str = ""


@dataclass(frozen=True)
class Cluster:
    """The objects of a cluster at one time.

    Args:
        now: when they were read, UTC.
        nodes: VduseNode.
        volumes: VduseVolume.
        snapshots: VduseSnapshot.
        persistent_volumes: PersistentVolume; empty if they may not be read.
    """

    now: dt.datetime
    nodes: Sequence[Object]
    volumes: Sequence[Object]
    snapshots: Sequence[Object]
    persistent_volumes: Sequence[Object]


def examine(cluster: Cluster) -> list[Finding]:
    """Judge a cluster; at least one finding."""
    found = [*_nodes(cluster), *_volumes(cluster), *_persistent_volumes(cluster)]
    if not cluster.nodes:
        found.append(
            Finding(
                "nodes",
                "bad",
                "no node has reported",
                "look at the pods of the node plugin: kubectl get pods -A -l app.kubernetes.io/part-of=csi-vduse",
            )
        )
    return found or [Finding("cluster", "good", "nothing is wrong")]


def _nodes(cluster: Cluster) -> Iterator[Finding]:
    for node in cluster.nodes:
        about, status = f"node {name_of(node)}", node.get("status", {})
        silent_s = _age_s(cluster, status.get("lastSeen"))
        if silent_s > SILENT_S:
            yield Finding(about, "bad", f"silent for {silent_s:.0f} s", "is its node plugin running?")
        elif not status.get("ready"):
            yield Finding(about, "bad", "; ".join(status.get("problems", [])) or "not ready", "mend that")
        elif status.get("agentVersion") != status.get("version"):
            versions = f"agent {status.get('agentVersion')}, node plugin {status.get('version')}"
            yield Finding(about, "warning", versions, "an upgrade is under way, or is stuck")
        else:
            yield Finding(about, "good", f"ready, {status.get('version', __version__)}")
        for pool in status.get("pools", []):
            if pool.get("problem"):
                yield Finding(f"{about}, pool {pool['name']}", "bad", pool["problem"], "mend that")


def _volumes(cluster: Cluster) -> Iterator[Finding]:
    known = {name_of(node) for node in cluster.nodes}
    for found in (*cluster.volumes, *cluster.snapshots):
        about, status = f"{found.get('kind', 'object')} {name_of(found)}", found.get("status", {})
        node = found["spec"].get("nodeName", "")
        error = status.get("error", {}).get("message", "")
        health = status.get("health", {})
        if is_going(found) and _age_s(cluster, found["metadata"]["deletionTimestamp"]) > STUCK_S:
            yield Finding(
                about, "warning", f"being deleted for long{': ' + error if error else ''}", _why(node, known)
            )
        elif health.get("status", "Healthy") != "Healthy":
            verdict: Literal["warning", "bad"] = "bad" if health["status"] == "Inaccessible" else "warning"
            yield Finding(about, verdict, health.get("message", ""), "docs/troubleshooting.md")
        elif error:
            yield Finding(about, "warning", error, status["error"].get("hint", ""))
        elif (
            objects.recorded_state(found) is None
            and _age_s(cluster, found["metadata"].get("creationTimestamp")) > STUCK_S
        ):
            yield Finding(about, "warning", f"node {node} has not begun to make it", _why(node, known))


def _why(node: str, known: set[str]) -> str:
    if node and node not in known:
        return f"node {node} is not in the cluster"
    return f"is the driver running on node {node}?" if node else ""


def _persistent_volumes(cluster: Cluster) -> Iterator[Finding]:
    """Find volumes that one side knows of and the other does not."""
    ours = [
        volume
        for volume in cluster.persistent_volumes
        if volume["spec"].get("csi", {}).get("driver") == DRIVER_NAME
        and nbd.URI not in volume["spec"]["csi"].get("volumeAttributes", {})  # an export made beforehand
    ]
    handles = {volume["spec"]["csi"]["volumeHandle"]: name_of(volume) for volume in ours}
    ids = {name_of(found) for found in cluster.volumes}
    for handle, name in handles.items():
        if handle not in ids:
            yield Finding(
                f"PersistentVolume {name}",
                "bad",
                f"its volume {handle} does not exist",
                "restore it, or delete the PV",
            )
    if not handles:
        return
    for found in cluster.volumes:
        is_old = _age_s(cluster, found["metadata"].get("creationTimestamp")) > STUCK_S
        if name_of(found) not in handles and not is_going(found) and is_old:
            remedy = f"if nobody misses it: kubectl delete vdusevolume {name_of(found)}"
            yield Finding(f"VduseVolume {name_of(found)}", "warning", "no PersistentVolume has it", remedy)


def _age_s(cluster: Cluster, time: str | None) -> float:
    if not time:
        return float("inf")
    return (cluster.now - dt.datetime.fromisoformat(time)).total_seconds()
