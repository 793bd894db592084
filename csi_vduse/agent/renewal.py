"""Another export for the next worker of a storage server's volume, and the end of what its worker before had.

A worker that was killed, and a node that lost its power, leave requests at the server: some in its hands, some not even
read. On a slow disk they can be done after those of the next worker, which serves them again, and after what the
application writes then to the same place. So before another worker serves, the server closes the export, waits for what
came through it, and opens another one.

Kept true: until the server has said so there is no next worker. A request that comes late, or again, closes nothing: it
names what it is to close.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace

from csi_vduse.agent.storage_channel import answered, open_channel
from csi_vduse.dataplane import nbd_uri
from csi_vduse.dataplane.backend_spec import NbdBackend
from csi_vduse.proto import storage_pb2, storage_pb2_grpc

# Longer than the server waits for requests in flight (45 s): it says better what hangs. A server that cannot be
# reached is known sooner.
_TIMEOUT_S = 60.0


async def renewed(published: NbdBackend, served: NbdBackend | None) -> NbdBackend:
    """Have the server close what earlier workers had, and return what the next one has.

    Args:
        published: as the volume was given to this node.
        served: what the last worker had; None: not known, since there was none, or what was known ended with a boot.

    Raises:
        NotFound: the volume was taken back from this node.
        Unavailable, DeadlineExceeded: the server is away, or requests are still in flight there; retry.
    """
    async with _server_of(published) as ask:
        if served is None:
            served = await ask("")
        return await ask(_export(served))


async def current(published: NbdBackend) -> NbdBackend:
    """Return what a volume is served from now, which changes nothing; raises as `renewed`."""
    async with _server_of(published) as ask:
        return await ask("")


@asynccontextmanager
async def _server_of(published: NbdBackend) -> AsyncIterator[Callable[[str], Awaitable[NbdBackend]]]:
    """Give what asks the server to renew; it takes what is to be closed."""
    tls_dir = published.tls.certificates if published.tls else None
    async with open_channel(published.control, tls_dir) as channel:
        stub: storage_pb2_grpc.StorageAsyncStub = storage_pb2_grpc.StorageStub(channel)

        async def ask(instead_of: str) -> NbdBackend:
            request = storage_pb2.RenewRequest(export=_export(published), instead_of=instead_of)
            answer = await answered(stub.Renew(request, timeout=_TIMEOUT_S), published.control)
            return replace(published, uri=answer.uri, write_through=answer.write_through)

        yield ask


def _export(backend: NbdBackend) -> str:
    return nbd_uri.parse(backend.uri).export
