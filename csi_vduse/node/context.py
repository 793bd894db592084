"""What every node operation needs: the agent, the registry, and a look at what is attached and mounted.

Nothing is remembered between calls. An operation looks (agent and mount table), decides, acts, and looks
again.
"""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from csi_vduse.agent.model import Attachment, AttachSpec, BusDevice, Probe, State
from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import FailedPrecondition, InvalidArgument, NotFound, Unavailable
from csi_vduse.node.foreign import ForeignVolumes
from csi_vduse.node.mounts import DeviceNumber, Mount, device_mounts, node_file, node_file_mounts, read_mounts
from csi_vduse.volumes.model import State as VolumeState
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.registry import Registry


class Agent(Protocol):
    """The part of the agent's client that the node needs; proto/agent.proto says what each call promises."""

    async def attach(self, spec: AttachSpec) -> Attachment:
        """Make the device; the same attachment again is returned."""
        ...

    async def detach(self, volume_id: str) -> None:
        """Remove the device; OK if there is none."""
        ...

    async def resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        """Tell the driver about a capacity that the backend already has."""
        ...

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        """Change how fast the volume may be."""
        ...

    async def list(self) -> Sequence[Attachment]:
        """Return every attachment of this node."""
        ...

    async def probe(self) -> Probe:
        """Tell whether the agent can work, and how many volumes it takes."""
        ...


@dataclass(frozen=True)
class NodeContext:
    """What the node operations work with.

    Args:
        node_id: name of this node in CSI answers.
        agent: owner of devices and workers.
        registry: what volumes are; the node writes only their file system record.
        data_path: tells where the bytes of a volume are, for the agent; from what publishing it told too.
        sysfs: where sysfs is mounted.
        foreign: volumes that the registry does not know; None: there are none.
    """

    node_id: str
    agent: Agent
    registry: Registry
    data_path: Callable[[Volume, Mapping[str, str]], Awaitable[BackendSpec]]
    sysfs: Path = Path("/sys")
    foreign: ForeignVolumes | None = None


@dataclass(frozen=True)
class Observed:
    """What was true when we looked.

    Args:
        attachment: the volume's, or None.
        attachments: all of this node.
        mounts: the mount table.
    """

    attachment: Attachment | None
    attachments: tuple[Attachment, ...]
    mounts: tuple[Mount, ...]

    def uses(self) -> tuple[Mount, ...]:
        """Return every mount of the volume: of its file system, and bind mounts of its device node."""
        return () if self.attachment is None else attachment_mounts(self.attachment, self.mounts)

    def mounted(self) -> tuple[Mount, ...]:
        """Return the mounts of the volume's file system."""
        device = self.attachment.device if self.attachment else None
        return device_mounts(self.mounts, device_number(device), str(device.path)) if device else ()

    def owner(self, mount: Mount) -> Attachment | None:
        """Return the attachment that a mount belongs to, or None if it is none of ours."""
        return next((one for one in self.attachments if mount in attachment_mounts(one, self.mounts)), None)


async def look(node: NodeContext, volume_id: str) -> Observed:
    """Read what is attached and mounted now."""
    attachments = tuple(await node.agent.list())
    attachment = next((one for one in attachments if one.volume_id == volume_id), None)
    return Observed(attachment, attachments, read_mounts())


def device_number(device: BusDevice) -> DeviceNumber:
    """Return the number of an attachment's disk or character device."""
    return DeviceNumber(device.major, device.minor)


def attachment_mounts(attachment: Attachment, mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    """Return the mounts of an attachment's file system and the bind mounts of its device node."""
    device = attachment.device
    if device is None:
        return ()
    path = str(device.path)
    of_node = node_file_mounts(mounts, node_file(mounts, path))
    return device_mounts(mounts, device_number(device), path) + tuple(
        mount for mount in of_node if mount.mount_point != path
    )


async def find_volume(node: NodeContext, volume_id: str) -> Volume | None:
    """Return a volume of the registry, or one that this node was given otherwise, or None."""
    volume = await node.registry.get_volume(volume_id)
    if volume is None and node.foreign is not None:
        return await node.foreign.find(volume_id)
    return volume


async def update_volume(node: NodeContext, volume_id: str, change: Callable[[Volume], Volume]) -> None:
    """Change the record of a volume, wherever it is.

    Raises:
        NotFound: no such volume.
    """
    if node.foreign is None or not await node.foreign.update(volume_id, change):
        await node.registry.update_volume(volume_id, change)


async def get_volume(node: NodeContext, volume_id: str) -> Volume:
    """Return a volume that is ready for use.

    Raises:
        NotFound: unknown, or being deleted.
        Unavailable: still being made.
    """
    volume = await find_volume(node, volume_id)
    if volume is None or volume.state is VolumeState.DELETING:
        raise NotFound(f"volume {volume_id!r} does not exist")
    if volume.state is not VolumeState.READY:
        raise Unavailable(f"volume {volume_id!r} is not ready: {volume.state.value}", hint="retry")
    return volume


def serving_device(attachment: Attachment) -> BusDevice:
    """Return the device of an attachment, if its worker serves it.

    Raises:
        Unavailable: its worker is dead or it is changing.
        FailedPrecondition: the kernel has given it up.
    """
    if attachment.state is State.ATTACHED and attachment.device is not None:
        return attachment.device
    text = f"volume {attachment.volume_id}: device {attachment.device_name} is {attachment.state.value}"
    if attachment.state_reason:
        text += f": {attachment.state_reason}"
    if attachment.state is State.BROKEN:
        raise FailedPrecondition(
            text, hint="end what uses the volume and unstage it; staging makes a new device"
        )
    raise Unavailable(text, hint="retry when its worker serves again")


def check_path(path: str, field: str) -> str:
    """Return a request's path as the mount table would show it: parent resolved, last component kept.

    The last component is not followed: it may be a mount point of a device that does not answer.

    Raises:
        InvalidArgument: missing, relative, with a NUL or ``..``, or the root directory.
    """
    if not path:
        raise InvalidArgument(f"{field} is missing")
    if not path.startswith("/") or "\0" in path or ".." in path.split("/"):
        raise InvalidArgument(f"{field} {path!r} is not an absolute path without '..'")
    parent, name = os.path.split(os.path.normpath(path))
    if not name:
        raise InvalidArgument(f"{field} {path!r} is the root directory")
    return os.path.join(os.path.realpath(parent), name)  # noqa: PTH118 - a str, byte for byte what mountinfo shows
