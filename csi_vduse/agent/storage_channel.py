"""The way to a storage server's control port, which controllers and agents share: a channel, and what its errors mean."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import grpc

from csi_vduse.agent import wire
from csi_vduse.dataplane.nbd_uri import CA_FILE, CLIENT_FILES
from csi_vduse.errors import DeadlineExceeded, FailedPrecondition, Unavailable

T = TypeVar("T")

# Two servers, one after the other at one address, are two to us; and one that is back is soon found.
_OPTIONS = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_reconnect_backoff_ms", 2000))


def open_channel(address: str, tls_dir: Path | None) -> grpc.aio.Channel:
    """Return a channel, which connects when it is first used, and again whenever its connection is lost.

    Args:
        address: HOST:PORT or unix:PATH.
        tls_dir: has ca-cert.pem, client-cert.pem, client-key.pem; None without TLS.

    Raises:
        FailedPrecondition: one of them cannot be read.
    """
    if tls_dir is None:
        return grpc.aio.insecure_channel(address, options=_OPTIONS)
    return grpc.aio.secure_channel(address, _credentials(tls_dir), options=_OPTIONS)


async def answered(call: Awaitable[T], address: str) -> T:
    """Return what a call to the server at an address gives.

    Raises:
        VduseError: what the server raised; Unavailable if none answers, DeadlineExceeded if it takes too long.
    """
    try:
        return await call
    except grpc.aio.AioRpcError as error:
        spoken = any(key == wire.ERROR_KEY for key, _ in error.trailing_metadata() or ())
        if spoken:
            raise wire.error_from_rpc(error) from error
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise DeadlineExceeded(
                f"the storage server at {address} did not answer in time", hint="retry"
            ) from error
        raise Unavailable(
            f"no storage server answers at {address}: {error.details()}",
            hint="is it running and reachable, and do both ends trust each other's certificates?",
        ) from error


def _credentials(directory: Path) -> grpc.ChannelCredentials:
    certificate, key = (directory / name for name in CLIENT_FILES)
    try:
        return grpc.ssl_channel_credentials(
            root_certificates=(directory / CA_FILE).read_bytes(),
            private_key=key.read_bytes(),
            certificate_chain=certificate.read_bytes(),
        )
    except OSError as error:
        raise FailedPrecondition(
            f"credentials for the storage server: {error}",
            hint=f"{directory} needs {CA_FILE}, {CLIENT_FILES}",
        ) from error
