"""Making the file of an image, which is seen when it is whole (store.py)."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from csi_vduse.run import run
from csi_vduse.storage.core import Core
from csi_vduse.storage.model import Format, Image


@asynccontextmanager
async def prepared(core: Core, image: Image) -> AsyncIterator[Path]:
    """Give a path for an image's file; unless the body ends well, with Store.finish, nothing is left of it."""
    path = await core.disk(core.store.prepare, image)
    try:
        yield path
    except BaseException:
        await core.disk(core.store.discard, path)
        raise


async def make_file(core: Core, path: Path, image: Image) -> None:
    """Make the file of an image that reads as zeros, in its format and with its size."""
    if image.format is Format.RAW:
        await core.disk(_make_sparse, path, image.size_bytes)
    else:
        await run(["qemu-img", "create", "-q", "-f", "qcow2", str(path), str(image.size_bytes)])


def _make_sparse(path: Path, size_bytes: int) -> None:
    with path.open("xb") as file:
        path.chmod(0o600)
        file.truncate(size_bytes)
