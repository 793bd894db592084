"""Pools of kind `qsd`: a storage server (csi_vduse/storage) on this node, whose disks are vhost-user sockets.

Images, copies and growth are the server's, as for kind `nbd`. Such a volume is its node's like one of a file pool, and
no controller publishes it: its socket is there from the first time that the node asks for it until it is deleted.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

from csi_vduse.backends.local import OfOneNode
from csi_vduse.backends.nbd import NbdLocation, NbdPool
from csi_vduse.backends.nbd import parse_location as parse_nbd_location
from csi_vduse.dataplane.backend_spec import BackendSpec, VhostUserBackend
from csi_vduse.errors import FailedPrecondition, InvalidArgument
from csi_vduse.storage.config import VHOST_USER_SCHEME
from csi_vduse.volumes.model import Volume

KIND: Final = "qsd"
_USER: Final = "this-node"  # to whom all is published: the server has no other


def parse_location(text: str) -> NbdLocation:
    """Parse where the storage server is: unix:/PATH, or a port of this machine.

    Raises:
        InvalidArgument: says what is wrong.
    """
    location = parse_nbd_location(text)
    if not location.address.is_local:
        raise InvalidArgument(
            f"qsd pool {text!r} is on another machine", hint="use unix:/PATH, or a pool of kind nbd"
        )
    return location


class QsdPool(OfOneNode, NbdPool):
    """A storage server's pool; see the Protocol Backend for what the methods promise, and NbdPool for arguments."""

    @property
    def kind(self) -> str:
        """Always "qsd"."""
        return KIND

    async def delete_volume(self, volume_id: str) -> None:
        """Have the server close the socket, and remove the image."""
        await self.check()
        await self._client.unpublish(volume_id, "")
        await super().delete_volume(volume_id)

    async def data_path(self, volume: Volume, publish_context: Mapping[str, str]) -> BackendSpec:
        """Return the volume's socket, which the server opens if it is not there.

        Raises:
            FailedPrecondition: the storage server serves over NBD.
            NotFound, Unavailable: it has no such image, or is away.
        """
        del publish_context
        await self.check()
        granted = await self._client.publish(volume.id, _USER, read_only=False, shared=False)
        scheme, _, socket = granted.uri.partition(":")
        if scheme != VHOST_USER_SCHEME:
            await self._client.unpublish(volume.id, _USER)
            raise FailedPrecondition(
                f"the storage server of pool {self.name!r} serves over {scheme}",
                hint="start it with --vhost-user DIR, or make the pool one of kind nbd",
            )
        return VhostUserBackend(Path(socket))
