"""What a worker is told about where the bytes are: a value that travels as JSON from agent to worker."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from csi_vduse.errors import InvalidArgument


@dataclass(frozen=True)
class FileBackend:
    """A raw image in a local file system, or a block device; absolute path."""

    path: Path


@dataclass(frozen=True)
class NullBackend:
    """Reads give zeros, writes vanish; for measurement."""


@dataclass(frozen=True)
class ErrorBackend:
    """Every request fails at once. No attachment has it: the device of one that is forced to go is served with it."""


BackendSpec = FileBackend | NullBackend
ServedBackend = BackendSpec | ErrorBackend


def to_json(spec: ServedBackend) -> dict[str, Any]:
    """Encode for the control channel and the records."""
    match spec:
        case FileBackend(path):
            return {"kind": "file", "path": str(path)}
        case NullBackend():
            return {"kind": "null"}
        case ErrorBackend():
            return {"kind": "error"}


def from_json(value: dict[str, Any]) -> ServedBackend:
    """Decode what ``to_json`` made.

    Raises:
        InvalidArgument: unknown kind, or a path that is missing or relative.
    """
    match value:
        case {"kind": "file", "path": str(path)} if Path(path).is_absolute():
            return FileBackend(Path(path))
        case {"kind": "null"}:
            return NullBackend()
        case {"kind": "error"}:
            return ErrorBackend()
    raise InvalidArgument(
        f"unknown backend {value!r}", hint='use {"kind": "file", "path": "/..."} or {"kind": "null"}'
    )
