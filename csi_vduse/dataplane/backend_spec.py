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


BackendSpec = FileBackend | NullBackend


def to_json(spec: BackendSpec) -> dict[str, Any]:
    """Encode for the control channel and the records."""
    match spec:
        case FileBackend(path):
            return {"kind": "file", "path": str(path)}
        case NullBackend():
            return {"kind": "null"}


def from_json(value: dict[str, Any]) -> BackendSpec:
    """Decode what ``to_json`` made.

    Raises:
        InvalidArgument: unknown kind, or a path that is missing or relative.
    """
    match value:
        case {"kind": "file", "path": str(path)} if Path(path).is_absolute():
            return FileBackend(Path(path))
        case {"kind": "null"}:
            return NullBackend()
    raise InvalidArgument(
        f"unknown backend {value!r}", hint='use {"kind": "file", "path": "/..."} or {"kind": "null"}'
    )
