"""How a controller talks to a storage server: values in, values out, the server's errors raised again.

Kept true: no call waits longer than its deadline, and a server that is away is Unavailable.
"""

from __future__ import annotations

from collections.abc import Awaitable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import grpc

from csi_vduse.agent.storage_channel import answered, open_channel
from csi_vduse.proto import storage_pb2, storage_pb2_grpc
from csi_vduse.storage.config import Address
from csi_vduse.storage.model import Key, Kind

T = TypeVar("T")

_ASK_TIMEOUT_S = 15.0
# Longer than what the server allows requests in flight: it says better what hung.
_ACT_TIMEOUT_S = 90.0
_COPY_GRACE_S = 30.0
_KINDS = {Kind.VOLUME: storage_pb2.IMAGE_KIND_VOLUME, Kind.SNAPSHOT: storage_pb2.IMAGE_KIND_SNAPSHOT}


@dataclass(frozen=True)
class ImageInfo:
    """A volume or snapshot as the server sees it; problem is empty if nothing is wrong."""

    size_bytes: int
    allocated_bytes: int
    problem: str


@dataclass(frozen=True)
class Granted:
    """What a node needs to use a volume; see storage.proto's Publication."""

    epoch: int
    uri: str
    write_through: bool = False
    renewable: bool = False


class StorageClient:
    """A connection to a storage server, made when first used and again whenever it is lost.

    Every method raises what the server raised, or Unavailable if none answers.

    Args:
        address: of its control port or socket.
        tls_dir: has ca-cert.pem, client-cert.pem, client-key.pem; None without TLS.
        ask_timeout_s: how long questions may take.
    """

    def __init__(
        self, address: Address, tls_dir: Path | None, *, ask_timeout_s: float = _ASK_TIMEOUT_S
    ) -> None:
        self._address = address
        self._tls_dir = tls_dir
        self._ask_timeout_s = ask_timeout_s
        self._channel: grpc.aio.Channel | None = None
        self._stub_: storage_pb2_grpc.StorageAsyncStub | None = None

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = self._stub_ = None

    async def pool_id(self) -> str:
        """Return the pool's id."""
        request = storage_pb2.StorageProbeRequest()
        return (await self._call(self._stub.Probe(request, timeout=self._ask_timeout_s))).pool_id

    async def usage(self) -> tuple[int, int, int]:
        """Return the pool's size, what others occupy, and what snapshots occupy, in bytes."""
        request = storage_pb2.GetUsageRequest()
        answer = await self._call(self._stub.GetUsage(request, timeout=self._ask_timeout_s))
        return answer.total_bytes, answer.foreign_bytes, answer.snapshot_bytes

    async def create(self, volume_id: str, size_bytes: int) -> None:
        """Make a volume that reads as zeros."""
        request = storage_pb2.CreateImageRequest(volume_id=volume_id, size_bytes=size_bytes)
        await self._call(self._stub.CreateVolume(request, timeout=_ACT_TIMEOUT_S))

    async def copy(self, source: Key, target: Key, size_bytes: int, *, timeout_s: float) -> int:
        """Make an image from another one, and return the moment of its content; see StorageServer.copy."""
        request = storage_pb2.CopyImageRequest(
            source_kind=_KINDS[source.kind],
            source_id=source.id,
            target_kind=_KINDS[target.kind],
            target_id=target.id,
            size_bytes=size_bytes,
            timeout_s=timeout_s,
        )
        return (await self._call(self._stub.CopyImage(request, timeout=timeout_s + _COPY_GRACE_S))).cut_at_ns

    async def expand(self, volume_id: str, size_bytes: int) -> None:
        """Grow a volume."""
        request = storage_pb2.ExpandImageRequest(volume_id=volume_id, size_bytes=size_bytes)
        await self._call(self._stub.ExpandVolume(request, timeout=_ACT_TIMEOUT_S))

    async def delete(self, key: Key) -> None:
        """Remove an image."""
        request = storage_pb2.DeleteImageRequest(kind=_KINDS[key.kind], id=key.id)
        await self._call(self._stub.DeleteImage(request, timeout=_ACT_TIMEOUT_S))

    async def image(self, key: Key) -> ImageInfo | None:
        """Return an image as it is, or None if there is none."""
        request = storage_pb2.GetImageRequest(kind=_KINDS[key.kind], id=key.id)
        answer = await self._call(self._stub.GetImage(request, timeout=self._ask_timeout_s))
        if not answer.found:
            return None
        return ImageInfo(answer.size_bytes, answer.allocated_bytes, answer.problem)

    async def progress(self, target: Key) -> tuple[int, int]:
        """Return how many bytes of how many a copy that is being made has, about; zeros if there is none."""
        request = storage_pb2.GetImageRequest(kind=_KINDS[target.kind], id=target.id)
        answer = await self._call(self._stub.GetImage(request, timeout=self._ask_timeout_s))
        return answer.copied_bytes, answer.total_bytes

    async def publications(self, volume_id: str = "") -> dict[str, tuple[str, ...]]:
        """Return where each published volume is, or this one alone."""
        request = storage_pb2.ListPublicationsRequest(volume_id=volume_id)
        answer = await self._call(self._stub.ListPublications(request, timeout=self._ask_timeout_s))
        return {one.volume_id: tuple(one.node_ids) for one in answer.volumes}

    async def publish(self, volume_id: str, node_id: str, *, read_only: bool, shared: bool) -> Granted:
        """Give a node an epoch and an export; see StorageServer.publish."""
        request = storage_pb2.PublishRequest(
            volume_id=volume_id, node_id=node_id, read_only=read_only, shared=shared
        )
        answer = await self._call(self._stub.Publish(request, timeout=_ACT_TIMEOUT_S))
        return Granted(answer.epoch, answer.uri, answer.write_through, answer.renewable)

    async def unpublish(self, volume_id: str, node_id: str = "") -> None:
        """Take a volume back from a node, or from all."""
        request = storage_pb2.UnpublishRequest(volume_id=volume_id, node_id=node_id)
        await self._call(self._stub.Unpublish(request, timeout=_ACT_TIMEOUT_S))

    @property
    def _stub(self) -> storage_pb2_grpc.StorageAsyncStub:
        if self._stub_ is None:
            self._channel = open_channel(str(self._address), self._tls_dir)
            self._stub_ = storage_pb2_grpc.StorageStub(self._channel)
        return self._stub_

    async def _call(self, call: Awaitable[T]) -> T:
        return await answered(call, str(self._address))
