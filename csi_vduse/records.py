"""Small JSON records that survive a crash at any point: written whole or not at all.

A record is written to a temporary file beside it, flushed, renamed over the old one, and the directory is
flushed. A reader therefore sees the old or the new record, never half of one. Temporary files left by a
crash start with a dot and are ignored by `list_records`.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from csi_vduse.errors import DataLoss
from csi_vduse.files import flush_directory

VERSION = 1


def write_record(path: Path, record: Mapping[str, Any], *, make_directory: bool = True) -> None:
    """Replace the record at `path` atomically and durably.

    Args:
        path: where; the directory should be on one file system with its parent.
        record: JSON-serialisable; "version" is added.
        make_directory: whether a missing directory is made, or is an error: what belonged beside the record is gone.

    Raises:
        OSError: the file system refused; the old record, if any, is still whole.
    """
    if make_directory:
        path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    data = json.dumps({"version": VERSION, **record}, indent=1, sort_keys=True).encode() + b"\n"
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    flush_directory(path.parent)


def read_record(path: Path) -> dict[str, Any] | None:
    """Return the record at `path`, or None if there is none.

    Raises:
        DataLoss: the file is not a record of a version we know.
        OSError: it cannot be read.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        record = json.loads(data)
    except ValueError as error:
        raise DataLoss(
            f"record {path} is not JSON: {error}", hint="restore it, or remove it by hand"
        ) from error
    if not isinstance(record, dict) or record.get("version") != VERSION:
        raise DataLoss(
            f"record {path} is not of version {VERSION}",
            hint="it was written by another release of csi-vduse; use that release, or remove it by hand",
        )
    return record


def delete_record(path: Path) -> None:
    """Remove the record at `path` durably; fine if there is none."""
    try:
        path.unlink()
    except FileNotFoundError:
        return
    flush_directory(path.parent)


def list_records(directory: Path, pattern: str = "*.json") -> Iterator[Path]:
    """Yield the records below `directory` that match `pattern`, in name order."""
    for path in sorted(directory.glob(pattern)):
        if not path.name.startswith("."):
            yield path
