"""The control port of a storage server, as an agent sees it: it renews one publication, and does nothing else.

Honest where it matters: an export that is not served is not closed, and the name that was published is the right to ask.
tests/unit/storage has the real one.
"""
# ruff: noqa: N802 - gRPC names its methods

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from csi_vduse.agent import wire
from csi_vduse.dataplane.backend_spec import NbdBackend
from csi_vduse.errors import NotFound, VduseError
from csi_vduse.proto import storage_pb2, storage_pb2_grpc

PUBLISHED = "v1.1.published"


class FakeStorage(storage_pb2_grpc.StorageServicer):
    """Answers at `path` between `start` and `stop`.

    `failure` is what it says instead; if it `loses_answers`, none arrives.
    """

    def __init__(self, path: Path) -> None:
        self.backend = NbdBackend(_uri(PUBLISHED), control=f"unix:{path}")
        self.served = PUBLISHED
        self.closed: list[str] = []
        self.requests = 0
        self.failure: VduseError | None = None
        self.loses_answers = False
        self._server: grpc.aio.Server | None = None

    @property
    def served_uri(self) -> str:
        return _uri(self.served)

    async def start(self) -> None:
        self._server = grpc.aio.server()
        storage_pb2_grpc.add_StorageServicer_to_server(self, self._server)
        self._server.add_insecure_port(self.backend.control)
        await self._server.start()

    async def stop(self) -> None:
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def Renew(
        self, request: storage_pb2.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> storage_pb2.Publication:
        self.requests += 1
        failure = self.failure
        if request.export != PUBLISHED:
            failure = NotFound("not published under this name")
        if failure is not None:
            await context.abort(*wire.error_status(failure))
        if request.instead_of == self.served:
            self.closed.append(self.served)
            self.served = f"v1.{len(self.closed) + 1}.renewed"
        if self.loses_answers:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the connection was lost")
        return storage_pb2.Publication(epoch=len(self.closed) + 1, uri=self.served_uri)


def _uri(export: str) -> str:
    return f"nbd+unix:///{export}?socket=/nbd.sock"
