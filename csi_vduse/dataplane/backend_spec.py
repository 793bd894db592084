"""What a worker is told about where the bytes are: a value that travels as JSON from agent to worker."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from csi_vduse.dataplane import nbd_uri
from csi_vduse.dataplane.nbd_uri import NbdTls
from csi_vduse.errors import InvalidArgument

__all__ = [
    "BackendSpec",
    "FileBackend",
    "NbdBackend",
    "NbdTls",
    "NullBackend",
    "VhostUserBackend",
    "from_json",
    "to_json",
]


@dataclass(frozen=True)
class FileBackend:
    """A raw image in a local file system, or a block device; absolute path."""

    path: Path


@dataclass(frozen=True)
class NullBackend:
    """Reads give zeros, writes vanish; for measurement."""


@dataclass(frozen=True)
class NbdBackend:
    """An export of an NBD server.

    Args:
        uri: by the NBD URI specification, without parameters but `socket`.
        tls: what TLS is done with; if and only if the URI asks for TLS.
        write_through: every write is made stable before it is answered (FUA): the server forgets what was not
            flushed when its process is killed, and the driver could not know.
        control: HOST:PORT or unix:PATH of the storage server that renews the export; empty: nobody can be asked. Not
            compared: it does not make another export of it.
    """

    uri: str
    tls: NbdTls | None = None
    write_through: bool = False
    control: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        """Refuse what can never be connected to."""
        if nbd_uri.parse(self.uri).tls != (self.tls is not None):
            raise InvalidArgument(f"{self.uri!r} and the keys for TLS do not fit together")


@dataclass(frozen=True)
class VhostUserBackend:
    """A vhost-user-blk server, which works on the driver's rings by itself.

    Args:
        socket: where it listens; absolute path.
        without_flush: it writes through, and need not be able to flush.
        mediated: requests go through the engine, which logs, limits and counts them; decided by the attach. Not compared:
            it makes no other disk of it.
    """

    socket: Path
    without_flush: bool = False
    mediated: bool = field(default=False, compare=False)


@dataclass(frozen=True)
class ErrorBackend:
    """Every request fails at once. No attachment has it: the device of one that is forced to go is served with it."""


BackendSpec = FileBackend | NbdBackend | NullBackend | VhostUserBackend
ServedBackend = BackendSpec | ErrorBackend


def to_json(spec: ServedBackend) -> dict[str, Any]:
    """Encode for the control channel and the records."""
    match spec:
        case FileBackend(path):
            return {"kind": "file", "path": str(path)}
        case NbdBackend(uri, tls, write_through, control):
            return {
                "kind": "nbd",
                "uri": uri,
                "tls": nbd_uri.tls_to_json(tls),
                "write_through": write_through,
                "control": control,
            }
        case NullBackend():
            return {"kind": "null"}
        case VhostUserBackend(socket, without_flush, mediated):
            return {
                "kind": "vhost-user",
                "socket": str(socket),
                "without_flush": without_flush,
                "mediated": mediated,
            }
        case ErrorBackend():
            return {"kind": "error"}


def from_json(value: dict[str, Any]) -> ServedBackend:
    """Decode what ``to_json`` made.

    Raises:
        InvalidArgument: unknown kind, a path that is missing or relative, or a URI that is none.
    """
    match value:
        case {"kind": "file", "path": str(path)} if Path(path).is_absolute():
            return FileBackend(Path(path))
        case {"kind": "nbd", "uri": str(uri), "tls": None | {} as tls}:
            # Records of earlier releases do not have the rest.
            write_through, control = value.get("write_through", False), str(value.get("control", ""))
            return NbdBackend(uri, nbd_uri.tls_from_json(tls), write_through, control)
        case {"kind": "null"}:
            return NullBackend()
        case {"kind": "vhost-user", "socket": str(socket), "without_flush": bool(without_flush)} if Path(
            socket
        ).is_absolute():
            return VhostUserBackend(Path(socket), without_flush, bool(value.get("mediated", False)))
        case {"kind": "error"}:
            return ErrorBackend()
    raise InvalidArgument(
        f"unknown backend {value!r}",
        hint='use {"kind": "file", "path": "/..."}, {"kind": "nbd", "uri": "nbd://...", "tls": null} or {"kind": "null"}',
    )
