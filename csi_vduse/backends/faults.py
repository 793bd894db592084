"""What the file system's errors mean to a caller: one table, applied at the edge of every pool operation."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from csi_vduse.errors import (
    FailedPrecondition,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
    VduseError,
)

_MEANING: dict[int, tuple[type[VduseError], str]] = {
    errno.ENOSPC: (ResourceExhausted, "make room on the pool's file system"),
    errno.EDQUOT: (ResourceExhausted, "raise the quota of the pool's file system"),
    errno.EMFILE: (ResourceExhausted, "raise the limit of open files"),
    errno.ENFILE: (ResourceExhausted, "raise fs.file-max"),
    errno.EFBIG: (OutOfRange, "the pool's file system does not hold files of this size"),
    errno.EROFS: (
        PermissionDenied,
        "the pool's file system is mounted read-only; look for errors in the kernel log",
    ),
    errno.EACCES: (PermissionDenied, "csi-vduse needs to write to the pool directory"),
    errno.EPERM: (PermissionDenied, "csi-vduse needs to write to the pool directory"),
    errno.ENOTDIR: (FailedPrecondition, "a part of the pool's path is not a directory"),
    errno.ENOENT: (FailedPrecondition, "a part of the pool vanished; is its file system mounted?"),
    errno.EEXIST: (FailedPrecondition, "something that is not ours stands in the pool's way; remove it"),
}


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Raise OSError from the body as one of our errors.

    Args:
        what: begins the message, such as "pool 'default'".

    Raises:
        VduseError: of the class that fits the errno; Unavailable for those we know nothing about.
    """
    try:
        yield
    except OSError as error:
        kind, hint = _MEANING.get(error.errno or 0, (Unavailable, "look for I/O errors in the kernel log"))
        raise kind(f"{what}: {error}", hint=hint) from error
