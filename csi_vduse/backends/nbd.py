"""Pools of kind `nbd`: a storage server (csi_vduse/storage), perhaps on another machine.

Images, copies and fences are the server's; here requests are put into its words, and guarded as file pools
are: the state directory remembers the pool's id, and a server with another pool is refused, so that deletes do
not find nothing, and leak, because an address has changed hands.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qsl

from csi_vduse import records
from csi_vduse.backends.base import Copying, PoolUsage
from csi_vduse.dataplane.backend_spec import BackendSpec, NbdBackend, NbdTls
from csi_vduse.errors import FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.storage.client import StorageClient
from csi_vduse.storage.config import DEFAULT_CONTROL_PORT, Address, parse_address
from csi_vduse.storage.model import Key, Kind
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool
from csi_vduse.volumes.model import Snapshot, Volume

KIND = "nbd"
# Keys of a publish_context.
URI = "uri"
EPOCH = "epoch"
WRITE_THROUGH = "writeThrough"  # "true", or not there
CONTROL = "control"  # where the storage server is asked for another export; not there: it cannot give one
# The directory of certificates, on the node; also a key of the volume_context of an export that was made beforehand.
TLS_DIRECTORY = "tlsDirectory"
_WATCH_PERIOD_S = 5.0
_OPTIONS = ("tls", "node-tls")


@dataclass(frozen=True)
class NbdLocation:
    """Where a pool's storage server is.

    Args:
        address: of its control port or socket.
        tls_dir: what the controller shows and trusts; None without TLS.
        node_tls_dir: the same for nodes, on the node.
    """

    address: Address
    tls_dir: Path | None = None
    node_tls_dir: Path | None = None


def parse_location(text: str) -> NbdLocation:
    """Parse `ADDRESS[?tls=DIR[&node-tls=DIR]]`, where ADDRESS is HOST[:PORT] or unix:/PATH.

    Raises:
        InvalidArgument: says what is wrong.
    """
    place, _, query = text.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for key, value in options.items():
        if key not in _OPTIONS:
            raise InvalidArgument(
                f"nbd pool {text!r} has unknown option {key!r}; allowed: {', '.join(_OPTIONS)}"
            )
        if not value.startswith("/"):
            raise InvalidArgument(f"nbd pool {text!r}: {key} {value!r} is not an absolute path")
    address = parse_address(place, DEFAULT_CONTROL_PORT)
    tls_dir = Path(options["tls"]) if "tls" in options else None
    if tls_dir is None and not address.is_local:
        raise InvalidArgument(
            f"nbd pool {text!r} is on another machine and has no tls=DIR",
            hint="a storage server gives orders to nobody without a certificate",
        )
    return NbdLocation(address, tls_dir, Path(options["node-tls"]) if "node-tls" in options else tls_dir)


class NbdPool:
    """A storage server's pool; see the Protocol Backend for what the methods promise.

    Args:
        name: of the pool.
        location: where its server is.
        memory: the file in the state directory that remembers the pool's id.
        client: talks to the server; None: one to `location`.
    """

    def __init__(
        self, name: str, location: NbdLocation, *, memory: Path, client: StorageClient | None = None
    ) -> None:
        self._name = name
        self._location = location
        self._memory = memory
        self._client = client or StorageClient(location.address, location.tls_dir)
        self._threads = BlockingPool(f"pool {name!r}", 1)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._name

    @property
    def kind(self) -> str:
        """Always "nbd"."""
        return KIND

    @property
    def needs_hold(self) -> bool:
        """The server cuts a copy at one moment by itself, whoever writes."""
        return False

    @property
    def keeps_copies(self) -> bool:
        """A copy is the server's job, and its image says what it is a copy of."""
        return True

    @property
    def max_hold_s(self) -> float:
        """Nothing is held."""
        return 0.0

    async def shares_blocks(self) -> bool:
        """The server copies all allocated blocks."""
        return False

    async def check(self) -> None:
        """Prove that the server answers and has the pool that we remember."""
        pool_id = await self._client.pool_id()
        await self._threads.run(DEFAULT_TIMEOUT_S, self._remember, pool_id)

    async def usage(self) -> PoolUsage:
        """Ask the server."""
        await self.check()
        return PoolUsage(*await self._client.usage())

    async def create(self, volume: Volume) -> None:
        """Have the server make an image that reads as zeros."""
        await self.check()
        await self._client.create(volume.id, volume.capacity_bytes)

    async def clone(self, source: Volume, volume: Volume, *, copying: Copying) -> int:
        """Have the server copy another volume, which may be in use."""
        return await self._copy(
            Key(Kind.VOLUME, source.id), Key(Kind.VOLUME, volume.id), volume.capacity_bytes, copying
        )

    async def restore(self, snapshot: Snapshot, volume: Volume, *, copying: Copying) -> int:
        """Have the server copy a snapshot to a volume."""
        source = Key(Kind.SNAPSHOT, snapshot.id)
        return await self._copy(source, Key(Kind.VOLUME, volume.id), volume.capacity_bytes, copying)

    async def snapshot(self, source: Volume, snapshot: Snapshot, *, copying: Copying) -> int:
        """Have the server copy a volume, which may be in use, to a snapshot."""
        target = Key(Kind.SNAPSHOT, snapshot.id)
        return await self._copy(Key(Kind.VOLUME, source.id), target, snapshot.size_bytes, copying)

    async def expand(self, volume: Volume, capacity_bytes: int) -> None:
        """Have the server grow the image; nodes that use it are cut off for a moment."""
        await self.check()
        await self._client.expand(volume.id, capacity_bytes)

    async def delete_volume(self, volume_id: str) -> None:
        """Have the server remove the image."""
        await self.check()
        await self._client.delete(Key(Kind.VOLUME, volume_id))

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Have the server remove the snapshot."""
        await self.check()
        await self._client.delete(Key(Kind.SNAPSHOT, snapshot_id))

    async def has_volume(self, volume_id: str) -> bool:
        """Ask the server."""
        await self.check()
        return await self._client.image(Key(Kind.VOLUME, volume_id)) is not None

    async def problem(self, volume: Volume) -> str:
        """Say whether the server is away, or the image missing or shorter than the volume."""
        try:
            await self.check()
            image = await self._client.image(Key(Kind.VOLUME, volume.id))
        except VduseError as error:
            return str(error)
        if image is None:
            return f"the storage server has no image of {volume.id}"
        if not image.problem and image.size_bytes < volume.capacity_bytes:
            return f"the image has {image.size_bytes} bytes, the volume has {volume.capacity_bytes}"
        return image.problem

    async def allocated_bytes(self, of: Volume | Snapshot) -> int:
        """Ask the server how much is allocated."""
        kind = Kind.VOLUME if isinstance(of, Volume) else Kind.SNAPSHOT
        image = await self._client.image(Key(kind, of.id))
        return image.allocated_bytes if image is not None else 0

    async def clean(self) -> None:
        """Nothing to do: the server removes at its own start what was interrupted."""

    async def publish(self, volume: Volume, node_id: str, *, read_only: bool, shared: bool) -> dict[str, str]:
        """Have the server give the node an epoch and an export of its own; say where it, and its certificates, are."""
        await self.check()
        granted = await self._client.publish(volume.id, node_id, read_only=read_only, shared=shared)
        told = {URI: granted.uri, EPOCH: str(granted.epoch)}
        if granted.write_through:
            told[WRITE_THROUGH] = "true"
        if granted.renewable:
            told[CONTROL] = str(self._location.address)
        if self._location.node_tls_dir is not None:
            told[TLS_DIRECTORY] = str(self._location.node_tls_dir)
        return told

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Have the server close the node's export."""
        await self.check()
        await self._client.unpublish(volume_id, node_id)

    async def published(self) -> Mapping[str, tuple[str, ...]]:
        """Ask the server."""
        return await self._client.publications()

    async def nodes_of(self, volume_id: str) -> tuple[str, ...]:
        """Ask the server."""
        return (await self._client.publications(volume_id)).get(volume_id, ())

    async def data_path(self, volume: Volume, publish_context: Mapping[str, str]) -> BackendSpec:
        """Return the export that was given to this node.

        Raises:
            FailedPrecondition: the volume was not published, or the node lacks its certificates.
        """
        return data_path(volume.id, publish_context)

    def close(self) -> None:
        """Stop the threads; the connection ends with the object. The pool is not used afterwards."""
        self._threads.close()

    async def _copy(self, source: Key, target: Key, size_bytes: int, copying: Copying) -> int:
        await self.check()
        watching = asyncio.create_task(self._watch(target, copying))
        try:
            timeout_s = copying.until_s - time.monotonic()
            return await self._client.copy(source, target, size_bytes, timeout_s=timeout_s)
        finally:
            watching.cancel()

    async def _watch(self, target: Key, copying: Copying) -> None:
        """Learn from time to time how far the server is with a copy."""
        while True:
            await asyncio.sleep(_WATCH_PERIOD_S)
            with suppress(VduseError):  # the call that waits for the copy tells what is wrong
                copying.copied_bytes, copying.total_bytes = await self._client.progress(target)

    def _remember(self, pool_id: str) -> None:
        memory = records.read_record(self._memory)
        if memory is None:
            records.write_record(self._memory, {"pool_id": pool_id, "location": str(self._location.address)})
        elif memory.get("pool_id") != pool_id:
            raise FailedPrecondition(
                f"the storage server at {self._location.address} has another pool than before",
                hint=f"is the address right, the directory mounted? If the pool is a new one, remove {self._memory}",
            )


def data_path(volume_id: str, publish_context: Mapping[str, str]) -> NbdBackend:
    """Return what the agent needs to use the export that a publish_context names.

    Args:
        volume_id: for messages.
        publish_context: what ControllerPublishVolume returned.

    Raises:
        FailedPrecondition: there is no export in it, or there are no certificates for it.
    """
    uri = publish_context.get(URI)
    if uri is None:
        raise FailedPrecondition(
            f"volume {volume_id} was not published to this node",
            hint="ControllerPublishVolume comes first; the CSIDriver object needs attachRequired: true",
        )
    write_through, control = WRITE_THROUGH in publish_context, publish_context.get(CONTROL, "")
    if not uri.startswith("nbds"):
        return NbdBackend(uri, write_through=write_through, control=control)
    if TLS_DIRECTORY not in publish_context:
        raise FailedPrecondition(
            f"volume {volume_id} is exported over TLS, and this node has no certificates",
            hint="give the pool node-tls=DIR",
        )
    tls = NbdTls(certificates=Path(publish_context[TLS_DIRECTORY]))
    return NbdBackend(uri, tls, write_through, control)
