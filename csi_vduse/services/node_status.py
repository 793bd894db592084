"""What a node tells the cluster about itself, for the controller and for people.

Its pools and fitness in a VduseNode, its attachments and their health in each volume's status, and an event
on the Node when the driver becomes unfit or fit.
Keeps true: something is written only when it differs from what the API has, and the node's own status at
most every NODE_PERIOD_S; nothing here is needed for I/O or recovery.
"""

from __future__ import annotations

import asyncio
import datetime as dt
import platform
from collections.abc import Awaitable, Callable
from contextlib import suppress

from csi_vduse import __version__, log, metrics
from csi_vduse.agent.model import Attachment, Probe
from csi_vduse.backends.base import Backend
from csi_vduse.backends.pools import Pools
from csi_vduse.errors import AlreadyExists, NotFound, VduseError
from csi_vduse.kube import events
from csi_vduse.kube.api import ApiServer, Conflict, pause
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import API_VERSION, CORE_NODES, NODES, VOLUMES, Object, name_of
from csi_vduse.node.context import Observed
from csi_vduse.node.health import findings
from csi_vduse.node.mounts import read_mounts
from csi_vduse.services.agent_port import Agent
from csi_vduse.services.reserving import Reservations
from csi_vduse.volumes import kubernetes_objects as objects
from csi_vduse.volumes.model import State
from csi_vduse.volumes.registry_kubernetes import KubernetesRegistry

NODE_PERIOD_S = 30.0
VOLUME_PERIOD_S = 5.0
_IMAGE_PERIOD_S = 60.0
_RETRY_S = 2.0

Announce = Callable[[Probe], None]


class NodeStatus:
    """See the module.

    Args:
        node: our name.
        api: where the objects are.
        registry: this node's.
        volumes: a mirror of this node's volumes.
        pools: this node's.
        reservations: knows what room they have left.
        agent: this node's.
        on_probe: told what every probe of the agent found.
        attached: set when something was attached or detached: that is told at once.
    """

    def __init__(
        self,
        *,
        node: str,
        api: ApiServer,
        registry: KubernetesRegistry,
        volumes: Mirror,
        pools: Pools,
        reservations: Reservations,
        agent: Agent,
        on_probe: Announce,
        attached: asyncio.Event,
    ) -> None:
        self._node = node
        self._api = api
        self._registry = registry
        self._volumes = volumes
        self._pools = pools
        self._reservations = reservations
        self._agent = agent
        self._on_probe = on_probe
        self._fit: bool | None = None
        self._has_left = False
        self._attached = attached
        self._problems: dict[str, str] = {}

    async def run(self) -> None:
        """Tell until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(_every(NODE_PERIOD_S, self.tell_node))
            group.create_task(_every(VOLUME_PERIOD_S, self.tell_volumes, self._attached))
            group.create_task(_every(_IMAGE_PERIOD_S, self.look_at_images))

    async def tell_node(self) -> None:
        """Measure the pools, ask the agent, and write the VduseNode."""
        probe = await self._probe()
        self._on_probe(probe)
        status = {
            "ready": probe.ready,
            "problems": list(probe.problems),
            "version": __version__,
            "agentVersion": probe.version,
            "kernel": platform.release(),
            "maxVolumes": probe.max_volumes,
            "pools": [await self._pool_status(backend) for backend in self._pools],
            "lastSeen": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        }
        await self._announce(probe)
        try:
            await self._registry.update_status(NODES, self._node, lambda _: status)
        except NotFound:
            if await self._make_node_object():
                await self._registry.update_status(NODES, self._node, lambda _: status)

    async def tell_volumes(self) -> None:
        """Write each volume's attachment and health where they changed."""
        try:
            attached = {one.volume_id: one for one in await self._agent.list()}
        except VduseError as error:
            log.get().debug("attachments are not known now", error=str(error))
            return
        mounts = read_mounts()
        everything = tuple(attached.values())
        for found in self._volumes.all():
            attachment = attached.get(name_of(found))
            status = self._volume_status(found, Observed(attachment, everything, mounts))
            if any(found.get("status", {}).get(key) != value for key, value in status.items()):
                with suppress(NotFound, Conflict):
                    await self._registry.update_status(VOLUMES, name_of(found), _adding(status))

    async def look_at_images(self) -> None:
        """Look whether the images of detached volumes are as recorded; `tell_volumes` says so."""
        problems = {}
        for found in self._volumes.all():
            volume = objects.volume_from_object(found)
            if volume is not None and volume.state is State.READY and not found["status"].get("attachment"):
                problems[volume.id] = await self._pools.holding(volume.pool).problem(volume)
        self._problems = problems

    def _volume_status(self, found: Object, observed: Observed) -> Object:
        if objects.recorded_state(found) is not State.READY:
            return {"attachment": None}
        attachment = observed.attachment
        if attachment is None:
            problem = self._problems.get(name_of(found), "")
            health = {"status": "Inaccessible" if problem else "Healthy", "message": problem}
            return {"attachment": None, "health": health}
        wrong = findings(observed)
        worst = max(wrong, key=lambda finding: finding.severity.value, default=None)
        return {
            "attachment": self._attachment_status(attachment),
            "health": {
                "status": worst.severity.name.capitalize() if worst else "Healthy",
                "message": " ".join(finding.message for finding in wrong),
            },
        }

    def _attachment_status(self, attachment: Attachment) -> Object:
        device = attachment.device
        return {
            "node": self._node,
            "state": attachment.state.value,
            "bus": attachment.spec.bus.value,
            "device": str(device.path) if device else attachment.device_name,
            "workerPid": attachment.worker_pid or 0,
        }

    async def _pool_status(self, backend: Backend) -> Object:
        status: Object = {"name": backend.name, "kind": backend.kind}
        try:
            usage = await backend.usage()
        except VduseError as error:
            metrics.observe_pool(backend.name, total_bytes=0, available_bytes=0)
            return {**status, "problem": str(error)}
        available_bytes = await self._reservations.available(backend)
        metrics.observe_pool(backend.name, total_bytes=usage.total_bytes, available_bytes=available_bytes)
        return {
            **status,
            "totalBytes": usage.total_bytes,
            "foreignBytes": usage.foreign_bytes,
            "snapshotBytes": usage.snapshot_bytes,
            "total": objects.rough_quantity(usage.total_bytes),
            "available": objects.rough_quantity(available_bytes),
        }

    async def _probe(self) -> Probe:
        try:
            return await self._agent.probe()
        except VduseError as error:
            return Probe("", ready=False, problems=(str(error),), max_volumes=0)

    async def _announce(self, probe: Probe) -> None:
        """Record an event when fitness changed; a good start is not worth one."""
        before, self._fit = self._fit, probe.ready
        if probe.ready == before or (before is None and probe.ready):
            return
        if probe.ready:
            event = events.NodeEvent(
                "Normal", "VduseReady", "csi-vduse can serve volumes on this node again."
            )
        else:
            note = f"csi-vduse cannot serve volumes on this node: {'; '.join(probe.problems) or 'not ready'}"
            event = events.NodeEvent("Warning", "VduseNotReady", note)
        await events.record(self._api, self._node, event)

    async def _make_node_object(self) -> bool:
        """Make our VduseNode, owned by the Node: it goes with it, and so tells that the node's data is lost.

        Without a Node none is made, and False returned: nothing would ever take it away, and what is on a node that
        has left the cluster would be waited for.
        """
        node = await self._api.get(CORE_NODES, self._node)
        if node is None:
            if not self._has_left:
                log.get().warning(
                    "the cluster has no Node of our name; it is told nothing until it has", node=self._node
                )
            self._has_left = True
            return False
        self._has_left = False
        owner = {"apiVersion": "v1", "kind": "Node", "name": self._node, "uid": node["metadata"]["uid"]}
        metadata = {"name": self._node, "ownerReferences": [owner]}
        with suppress(AlreadyExists):
            await self._api.create(
                NODES, {"apiVersion": API_VERSION, "kind": NODES.kind, "metadata": metadata}
            )
        return True


def _adding(status: Object) -> Callable[[Object], Object]:
    return lambda now: {**now.get("status", {}), **status}


async def _every(
    period_s: float, act: Callable[[], Awaitable[None]], wake: asyncio.Event | None = None
) -> None:
    """Do it now and then again and again; what fails is logged and tried again soon.

    Args:
        period_s: at least so often.
        act: what.
        wake: also when this is set.
    """
    wake = wake or asyncio.Event()
    while True:
        wait_s = period_s
        wake.clear()
        try:
            await act()
        except VduseError as error:
            log.get().warning("the node's status was not told", error=str(error))
            wait_s = min(period_s, _RETRY_S)
        except Exception:  # noqa: BLE001 - telling must not end the process
            log.get().exception("unexpected error")
        await pause(wait_s, wake)
