"""storage.proto over a StorageServer: decode, ask, encode; who may ask; where it listens.

A call that has begun is carried to its end if its caller goes away: the retry finds it done.
"""
# ruff: noqa: N802 - gRPC names its methods

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, NoReturn, TypeVar

import grpc
import structlog

from csi_vduse import __version__, log
from csi_vduse.agent import wire
from csi_vduse.agent.server import claim_socket
from csi_vduse.dataplane.nbd_uri import CA_FILE
from csi_vduse.errors import FailedPrecondition, InvalidArgument, PermissionDenied, VduseError
from csi_vduse.proto import storage_pb2, storage_pb2_grpc
from csi_vduse.storage.config import SERVER_FILES, ServerConfig, Tls
from csi_vduse.storage.model import Key, Kind, volume_of
from csi_vduse.storage.publications import Published
from csi_vduse.storage.server import ImageStatus, StorageServer

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_GRACE_S = 10.0
_SOCKET_UMASK = 0o177  # who may connect may remove every volume
_KINDS: dict[int, Kind] = {
    storage_pb2.IMAGE_KIND_VOLUME: Kind.VOLUME,
    storage_pb2.IMAGE_KIND_SNAPSHOT: Kind.SNAPSHOT,
}


class StorageServicer(storage_pb2_grpc.StorageServicer):
    """The service.

    Args:
        server: does it.
        controllers: common names of certificates that may ask; empty where there is no TLS.
    """

    def __init__(self, server: StorageServer, controllers: tuple[str, ...] = ()) -> None:
        self._server = server
        self._controllers = controllers
        self._running: set[asyncio.Task[Any]] = set()

    async def Probe(
        self, request: storage_pb2.StorageProbeRequest, context: Context
    ) -> storage_pb2.StorageProbeResponse:
        """See storage.proto."""
        del request
        pool_id = await self._carry("Probe", "", context, self._server.pool_id())
        return storage_pb2.StorageProbeResponse(version=__version__, pool_id=pool_id)

    async def GetUsage(
        self, request: storage_pb2.GetUsageRequest, context: Context
    ) -> storage_pb2.GetUsageResponse:
        """See storage.proto."""
        del request
        total, foreign, snapshots = await self._carry("GetUsage", "", context, self._server.usage())
        return storage_pb2.GetUsageResponse(
            total_bytes=total, foreign_bytes=foreign, snapshot_bytes=snapshots
        )

    async def CreateVolume(
        self, request: storage_pb2.CreateImageRequest, context: Context
    ) -> storage_pb2.CreateImageResponse:
        """See storage.proto."""
        act = self._server.create(request.volume_id, request.size_bytes)
        await self._carry("CreateVolume", request.volume_id, context, act)
        return storage_pb2.CreateImageResponse()

    async def CopyImage(
        self, request: storage_pb2.CopyImageRequest, context: Context
    ) -> storage_pb2.CopyImageResponse:
        """See storage.proto."""

        async def act() -> int:
            source = _key(request.source_kind, request.source_id)
            target = _key(request.target_kind, request.target_id)
            return await self._server.copy(source, target, request.size_bytes, timeout_s=request.timeout_s)

        return storage_pb2.CopyImageResponse(
            cut_at_ns=await self._carry("CopyImage", request.target_id, context, act())
        )

    async def ExpandVolume(
        self, request: storage_pb2.ExpandImageRequest, context: Context
    ) -> storage_pb2.ExpandImageResponse:
        """See storage.proto."""
        act = self._server.expand(request.volume_id, request.size_bytes)
        await self._carry("ExpandVolume", request.volume_id, context, act)
        return storage_pb2.ExpandImageResponse()

    async def DeleteImage(
        self, request: storage_pb2.DeleteImageRequest, context: Context
    ) -> storage_pb2.DeleteImageResponse:
        """See storage.proto."""

        async def act() -> None:
            await self._server.delete(_key(request.kind, request.id))

        await self._carry("DeleteImage", request.id, context, act())
        return storage_pb2.DeleteImageResponse()

    async def GetImage(
        self, request: storage_pb2.GetImageRequest, context: Context
    ) -> storage_pb2.GetImageResponse:
        """See storage.proto."""

        async def act() -> tuple[ImageStatus | None, tuple[int, int]]:
            key = _key(request.kind, request.id)
            return await self._server.status(key), await self._server.progress(key)

        status, (copied, total) = await self._carry("GetImage", request.id, context, act())
        if status is None:
            return storage_pb2.GetImageResponse(found=False, copied_bytes=copied, total_bytes=total)
        return storage_pb2.GetImageResponse(
            found=True,
            size_bytes=status.image.size_bytes,
            allocated_bytes=status.allocated_bytes,
            problem=status.problem,
        )

    async def ListPublications(
        self, request: storage_pb2.ListPublicationsRequest, context: Context
    ) -> storage_pb2.ListPublicationsResponse:
        """See storage.proto."""
        volumes = await self._carry("ListPublications", "", context, self._server.volumes())
        return storage_pb2.ListPublicationsResponse(
            volumes=[
                storage_pb2.PublishedVolume(
                    volume_id=image.key.id, node_ids=[one.node_id for one in image.publications]
                )
                for image in volumes
                if image.publications and request.volume_id in {"", image.key.id}
            ]
        )

    async def Publish(self, request: storage_pb2.PublishRequest, context: Context) -> storage_pb2.Publication:
        """See storage.proto."""
        act = self._server.publish(
            request.volume_id, request.node_id, read_only=request.read_only, shared=request.shared
        )
        return _publication(await self._carry("Publish", request.volume_id, context, act))

    async def Unpublish(
        self, request: storage_pb2.UnpublishRequest, context: Context
    ) -> storage_pb2.UnpublishResponse:
        """See storage.proto."""
        act = self._server.unpublish(request.volume_id, request.node_id)
        await self._carry("Unpublish", request.volume_id, context, act)
        return storage_pb2.UnpublishResponse()

    async def Renew(self, request: storage_pb2.RenewRequest, context: Context) -> storage_pb2.Publication:
        """See storage.proto."""
        act = self._server.renew(request.export, request.instead_of)
        volume_id = volume_of(request.export).id
        return _publication(await self._carry("Renew", volume_id, context, act, of_nodes=True))

    async def drain(self) -> None:
        """Let calls end whose callers have gone."""
        if self._running:
            await asyncio.wait(self._running, timeout=_GRACE_S)

    async def _carry(
        self,
        rpc: str,
        image_id: str,
        context: Context,
        act: Coroutine[Any, Any, T],
        *,
        of_nodes: bool = False,
    ) -> T:
        with structlog.contextvars.bound_contextvars(
            rpc=f"Storage/{rpc}", **({"id": image_id} if image_id else {})
        ):
            try:
                if not of_nodes:
                    self._require_controller(context)
            except VduseError as error:
                act.close()
                await _abort(context, error)
            task = asyncio.create_task(act)
            self._running.add(task)
            task.add_done_callback(self._ended)
            try:
                return await asyncio.shield(task)
            except VduseError as error:
                log.get().warning("call failed", error=str(error), code=error.grpc_code)
                await _abort(context, error)

    def _require_controller(self, context: Context) -> None:
        """Refuse the certificates of nodes: they may use exports and have their own renewed, no more."""
        if not self._controllers:
            return
        names = [name.decode(errors="replace") for name in context.auth_context().get("x509_common_name", ())]
        if not any(name in self._controllers for name in names):
            raise PermissionDenied(
                f"the certificate of {', '.join(names) or 'nobody'} may not give orders to this storage server",
                hint=f"allowed: {', '.join(self._controllers)}",
            )

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._running.discard(task)
        if not task.cancelled():
            task.exception()  # marks it as seen: its caller may have gone


def _publication(published: Published) -> storage_pb2.Publication:
    return storage_pb2.Publication(
        epoch=published.epoch,
        uri=published.uri,
        write_through=published.write_through,
        renewable=published.renewable,
    )


def _key(kind: int, image_id: str) -> Key:
    if kind not in _KINDS:
        raise InvalidArgument(f"image {image_id!r} is neither a volume nor a snapshot", hint="set its kind")
    return Key(_KINDS[kind], image_id)


@asynccontextmanager
async def listening(config: ServerConfig, server: StorageServer) -> AsyncIterator[None]:
    """Take calls while the body runs.

    Raises:
        FailedPrecondition: the address is taken, or cannot be had.
    """
    servicer = StorageServicer(server, config.tls.controllers if config.tls else ())
    rpc = grpc.aio.server()
    storage_pb2_grpc.add_StorageServicer_to_server(servicer, rpc)
    address = config.control
    if address.path is not None:
        claim_socket(address.path)
    target = str(address)
    before = os.umask(_SOCKET_UMASK)
    try:
        if config.tls is not None:
            rpc.add_secure_port(target, _credentials(config.tls))
        else:
            rpc.add_insecure_port(target)
        await rpc.start()
    except (RuntimeError, OSError) as error:  # RuntimeError is what gRPC raises when it cannot bind
        raise FailedPrecondition(f"cannot listen on {target}: {error}", hint="check --control") from error
    finally:
        os.umask(before)
    serving = str(config.vhost_user or config.nbd)
    log.get().info("storage server is ready", control=target, serving=serving, tls=config.tls is not None)
    try:
        yield
    finally:
        await rpc.stop(_GRACE_S)
        await servicer.drain()
        if address.path is not None:
            address.path.unlink(missing_ok=True)


def _credentials(tls: Tls) -> grpc.ServerCredentials:
    certificate, key = (tls.directory / name for name in SERVER_FILES)
    try:
        pair = (key.read_bytes(), certificate.read_bytes())
        authority = (tls.directory / CA_FILE).read_bytes()
    except OSError as error:
        raise InvalidArgument(f"--tls-dir: {error}") from error
    return grpc.ssl_server_credentials([pair], root_certificates=authority, require_client_auth=True)


async def _abort(context: Context, error: VduseError) -> NoReturn:
    code, message, metadata = wire.error_status(error)
    await context.abort(code, message, metadata)
    raise AssertionError
