"""Events for people: what `kubectl describe node` shows about the driver. Best effort: losing one is harmless."""

from __future__ import annotations

import datetime as dt
from dataclasses import dataclass
from typing import Literal

from csi_vduse import DRIVER_NAME, log
from csi_vduse.errors import VduseError
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.resources import events

_MAX_NOTE_CHARS = 1000  # events.k8s.io/v1: a note has at most 1 kB
_NAMESPACE = "default"  # where events about cluster-wide objects belong


@dataclass(frozen=True)
class NodeEvent:
    """Something that happened to the driver on a node.

    Args:
        type: whether somebody should look.
        reason: CamelCase word for programs.
        note: sentence for people.
    """

    type: Literal["Normal", "Warning"]
    reason: str
    note: str


async def record(api: ApiServer, node: str, event: NodeEvent) -> None:
    """Write an event about a node; a failure is logged."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    body = {
        "apiVersion": "events.k8s.io/v1",
        "kind": "Event",
        "metadata": {"generateName": "csi-vduse-" + node[:180].rstrip("-.") + "-", "namespace": _NAMESPACE},
        "eventTime": now,
        "reportingController": DRIVER_NAME,
        "reportingInstance": node[:128],
        "action": "CheckDriver",
        "type": event.type,
        "reason": event.reason,
        "note": event.note[:_MAX_NOTE_CHARS],
        # kubectl finds the events of a node by this: kubelet uses the name as the uid, too.
        "regarding": {"apiVersion": "v1", "kind": "Node", "name": node, "uid": node},
    }
    try:
        await api.create(events(_NAMESPACE), body)
    except VduseError as error:
        log.get().warning("an event was not recorded", reason=event.reason, error=str(error))
