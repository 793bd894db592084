"""From an NbdBackend to what the C engine takes, and from what the C engine says to errors and values."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from typing import Any, Final

from csi_vduse.dataplane import nbd_uri
from csi_vduse.dataplane._engine import ffi, lib
from csi_vduse.dataplane.backend_spec import NbdBackend
from csi_vduse.errors import (
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    ProtocolError,
    Unavailable,
    VduseError,
)

REASON_BYTES: Final = 160
_READ_ONLY = 1 << 1
_MULTI_CONN = 1 << 8


@dataclass(frozen=True)
class NbdExport:
    """What a server says of an export.

    size_bytes: of whole blocks; said_bytes: of all of it.
    multi_conn: it may be used through several connections, so by several queues.
    """

    size_bytes: int
    said_bytes: int
    min_block_bytes: int
    max_payload_bytes: int
    read_only: bool
    multi_conn: bool
    structured: bool
    extended: bool
    tls_in_kernel: bool


def encode(backend: NbdBackend, keep: list[Any], *, wait: bool, broker_fd: int | None = None) -> Any:  # noqa: ANN401 - cffi's pointers have no type
    """Return a struct vd_nbd_config; it is valid as long as keep is."""
    address, tls = nbd_uri.parse(backend.uri), backend.tls

    def string(value: object) -> Any:  # noqa: ANN401
        keep.append(ffi.new("char[]", os.fsencode(str(value or ""))))
        return keep[-1]

    config = ffi.new(
        "struct vd_nbd_config *",
        {
            "host": string(address.host),
            "service": string(address.port),
            "socket": string(address.socket),
            "export_name": string(address.export),
            "tls": address.tls,
            "certificates": string(tls and tls.certificates),
            "psk_file": string(tls and tls.psk_file),
            "psk_identity": string(address.identity),
            "tls_hostname": string(tls and tls.hostname),
            "write_through": backend.write_through,
            "wait": wait,
            "brokered": broker_fd is not None,
            "broker_fd": broker_fd or 0,
        },
    )
    keep.append(config)
    return config


def probe(backend: NbdBackend, *, timeout_s: float) -> NbdExport:
    """Ask a server about an export, on a connection of its own.

    Raises:
        Unavailable, NotFound, PermissionDenied, FailedPrecondition, ProtocolError: as `error` says.
    """
    keep: list[Any] = []
    reason = ffi.new("char[]", REASON_BYTES)
    info = ffi.new("struct vd_nbd_info *")
    result = lib.vd_nbd_probe(encode(backend, keep, wait=False), int(timeout_s * 1000), info, reason)
    if result < 0:
        raise error(-result, backend.uri, text(reason))
    return NbdExport(
        size_bytes=int(info.size_bytes),
        said_bytes=int(info.said_bytes),
        min_block_bytes=int(info.min_block_bytes),
        max_payload_bytes=int(info.max_payload_bytes),
        read_only=bool(info.flags & _READ_ONLY),
        multi_conn=bool(info.flags & _MULTI_CONN),
        structured=bool(info.structured),
        extended=bool(info.extended),
        tls_in_kernel=bool(info.tls_in_kernel),
    )


def text(reason: Any) -> str:  # noqa: ANN401
    """Return what the C side wrote; the server may have had a part in it."""
    raw: bytes = ffi.string(reason)
    return raw.decode(errors="replace")


def error(number: int, uri: str, reason: str) -> VduseError:
    """Return the error for a connection that could not be made."""
    message = f"{uri}: {reason or os.strerror(number)}"
    kind = _ERRORS.get(number)
    if kind is None:
        return Unavailable(
            message,
            hint="is the server running, and its address right? One that ends with its first client, as qemu-nbd does "
            "without --persistent, is not there any more when it has been asked what it has",
        )
    return kind(message, hint="serve it with one queue" if number == errno.EMLINK else "")


_ERRORS: Final[dict[int, type[VduseError]]] = {
    errno.ENOENT: NotFound,
    errno.EACCES: PermissionDenied,
    errno.ENOSPC: FailedPrecondition,
    errno.EROFS: FailedPrecondition,
    errno.EMLINK: FailedPrecondition,
    errno.EPROTO: ProtocolError,
    errno.EINVAL: InvalidArgument,
    errno.ENAMETOOLONG: InvalidArgument,
}
