"""Pools of kind `file`: a directory of one node, an image file for each volume and snapshot.

Layout: `pool.json` (the pool's mark), `volumes/ID/{image.raw,meta.json}`, `snapshots/ID/` likewise.
Images are sparse. An image is made in `ID.RANDOM.tmp` and renamed, so a directory without `.tmp` is always
whole; what dies on the way is removed by `clean` at the next start. The random part keeps a thread that was
given up, and still runs, away from the try that followed it. meta.json tells a person what a directory is if
the registry is lost; no code trusts it.

The mark guards against an unmounted pool: the state directory remembers the mark's id, and a directory
without it is refused. Otherwise volumes would be made on the root file system, and deletes would find nothing
and leak.
"""

from __future__ import annotations

import asyncio
import errno
import os
import secrets
import stat
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ParamSpec, TypeVar
from urllib.parse import parse_qsl

from csi_vduse import records
from csi_vduse.backends.base import MAX_HOLD_S, Copying, PoolUsage
from csi_vduse.backends.copying import can_share_blocks, copy_image
from csi_vduse.backends.faults import translated
from csi_vduse.backends.local import OfOneNode
from csi_vduse.dataplane.backend_spec import BackendSpec, FileBackend
from csi_vduse.errors import DataLoss, DeadlineExceeded, FailedPrecondition, InvalidArgument, VduseError
from csi_vduse.files import UNFINISHED, allocated_bytes, flush_directory, remove_tree, unfinished
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool
from csi_vduse.volumes.model import Snapshot, Volume, snapshot_to_json, volume_to_json

P = ParamSpec("P")
R = TypeVar("R")

KIND = "file"
IMAGE = "image.raw"
_META = "meta.json"
_MARK = "pool.json"
_SMALL_THREADS = 4
# What applications take for a slow disk; longer is asked for in the pool's configuration.
DEFAULT_MAX_HOLD_S = 10.0
_MAX_HOLD = "max-hold-seconds"
# A copy is stopped by its own deadline; the thread's is a little later and only catches a hanging call.
_COPY_GRACE_S = 30.0
_TARGET_EXISTS = (errno.EEXIST, errno.ENOTEMPTY)  # rename(2)

Fill = Callable[[int], None]


@dataclass(frozen=True)
class FileLocation:
    """Where a pool's directory is, and for how long an attached volume may be held still while it is copied."""

    directory: Path
    max_hold_s: float = DEFAULT_MAX_HOLD_S


def parse_location(text: str) -> FileLocation:
    """Parse `DIR[?max-hold-seconds=N]`.

    Raises:
        InvalidArgument: says what is wrong.
    """
    directory, _, query = text.partition("?")
    location = FileLocation(Path(directory))
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key != _MAX_HOLD:
            raise InvalidArgument(f"file pool {text!r} has unknown option {key!r}; allowed: {_MAX_HOLD}")
        if not (value.isascii() and value.isdecimal() and int(value) <= MAX_HOLD_S):
            raise InvalidArgument(f"file pool {text!r}: {key} {value!r} is not 0 to {MAX_HOLD_S:.0f}")
        location = replace(location, max_hold_s=float(value))
    return location


class FilePool(OfOneNode):
    """A pool in a directory; see the Protocol Backend for what the methods promise.

    Args:
        name: of the pool.
        directory: where; must exist. It is never made: a missing one is most likely not mounted.
        memory: the file in the state directory that remembers this pool's mark.
        copy_threads: how many images are copied at once.
        max_hold_s: for how long an attached volume may be held still while it is copied.
    """

    def __init__(
        self,
        name: str,
        directory: Path,
        *,
        memory: Path,
        copy_threads: int = 4,
        max_hold_s: float = DEFAULT_MAX_HOLD_S,
    ) -> None:
        self._name = name
        self._max_hold_s = max_hold_s
        self._directory = directory
        self._memory = memory
        self._marking = threading.Lock()
        # Threads of its own: a pool that hangs holds up no other.
        self._small = BlockingPool(f"pool {name!r}", _SMALL_THREADS)
        self._copies = BlockingPool(f"copy in pool {name!r}", copy_threads)

    @property
    def name(self) -> str:
        """The pool's name."""
        return self._name

    @property
    def kind(self) -> str:
        """Always "file"."""
        return KIND

    @property
    def needs_hold(self) -> bool:
        """An image is copied while it may be written: its worker has to hold still."""
        return True

    @property
    def keeps_copies(self) -> bool:
        """A copy is a thread of this process, and a whole image of it may be one whose hold was broken."""
        return False

    @property
    def max_hold_s(self) -> float:
        """As the pool's configuration allows."""
        return self._max_hold_s

    async def shares_blocks(self) -> bool:
        """Try it with a file that nobody sees."""
        return await self._short(can_share_blocks, self._directory)

    async def check(self) -> None:
        """Prove that the directory is there, is one, and carries the mark that we remember."""
        await self._short(self._check)

    async def usage(self) -> PoolUsage:
        """Measure the file system and what of it is ours."""
        return await self._short(self._usage)

    async def create(self, volume: Volume) -> None:
        """Make a sparse image of the volume's capacity."""
        until_s = time.monotonic() + DEFAULT_TIMEOUT_S - _COPY_GRACE_S
        await self._short(self._make_volume, volume, lambda _fd: None, Copying(until_s))

    async def clone(self, source: Volume, volume: Volume, *, copying: Copying) -> int:
        """Copy another volume's image."""
        fill = self._filler(self._volume_image(source.id), source.capacity_bytes, copying)
        await self._long(copying, self._make_volume, volume, fill)
        return 0

    async def restore(self, snapshot: Snapshot, volume: Volume, *, copying: Copying) -> int:
        """Copy a snapshot's image."""
        fill = self._filler(self._snapshot_image(snapshot.id), snapshot.size_bytes, copying)
        await self._long(copying, self._make_volume, volume, fill)
        return 0

    async def snapshot(self, source: Volume, snapshot: Snapshot, *, copying: Copying) -> int:
        """Copy a volume's image to a snapshot."""
        fill = self._filler(self._volume_image(source.id), snapshot.size_bytes, copying)
        target = self._snapshot_image(snapshot.id).parent
        await self._long(copying, self._make, target, snapshot.size_bytes, snapshot_to_json(snapshot), fill)
        return 0

    async def expand(self, volume: Volume, capacity_bytes: int) -> None:
        """Grow the image; the new end is a hole."""
        await self._short(self._expand, volume, capacity_bytes)

    async def delete_volume(self, volume_id: str) -> None:
        """Remove the volume's directory."""
        await self._short(self._delete, self._volume_image(volume_id).parent)

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Remove the snapshot's directory."""
        await self._short(self._delete, self._snapshot_image(snapshot_id).parent)

    async def has_volume(self, volume_id: str) -> bool:
        """Tell whether the volume's directory is there."""
        return await self._short(self._exists, self._volume_image(volume_id).parent)

    async def problem(self, volume: Volume) -> str:
        """Say whether the pool is away, or the image missing or shorter than the volume."""
        try:
            await self._short(self._verify, volume)
        except VduseError as error:
            return str(error)
        return ""

    async def allocated_bytes(self, of: Volume | Snapshot) -> int:
        """Measure the blocks of the image."""
        path = self._volume_image(of.id) if isinstance(of, Volume) else self._snapshot_image(of.id)
        return await self._short(allocated_bytes, path)

    async def clean(self) -> None:
        """Remove `*.tmp` below volumes and snapshots: what interrupted calls left."""
        # Two calls: what is listed too late, after we were given up, is another's work in progress.
        leftovers = await self._short(self._leftovers)
        await self._short(self._remove, leftovers)

    async def data_path(self, volume: Volume, publish_context: Mapping[str, str]) -> BackendSpec:
        """Return the image's path."""
        del publish_context
        return FileBackend(self._volume_image(volume.id).absolute())

    def close(self) -> None:
        """Stop the threads; the pool is not used afterwards."""
        self._small.close()
        self._copies.close()

    # Everything below is synchronous and runs in a thread.

    async def _short(self, function: Callable[P, R], *args: P.args, **kwargs: P.kwargs) -> R:
        with translated(f"pool {self._name!r}"):
            return await self._small.run(DEFAULT_TIMEOUT_S, function, *args, **kwargs)

    async def _long(self, copying: Copying, function: Callable[..., None], *args: object) -> None:
        """Make a copy; if nobody waits for it any more, it has ended before the caller goes on, if its disk lets it."""
        timeout_s = max(copying.until_s - time.monotonic(), 0.0) + _COPY_GRACE_S
        with translated(f"pool {self._name!r}"):
            making = asyncio.ensure_future(self._copies.run(timeout_s, function, *args, copying))
            try:
                await asyncio.shield(making)
            except asyncio.CancelledError:
                copying.is_unwanted = True
                making.add_done_callback(lambda ended: ended.cancelled() or ended.exception())
                await asyncio.wait({making}, timeout=_COPY_GRACE_S)
                raise

    def _volume_image(self, volume_id: str) -> Path:
        return self._directory / "volumes" / volume_id / IMAGE

    def _snapshot_image(self, snapshot_id: str) -> Path:
        return self._directory / "snapshots" / snapshot_id / IMAGE

    def _check(self) -> None:
        what = f"pool {self._name!r}: {self._directory}"
        try:
            mode = self._directory.stat().st_mode
        except FileNotFoundError:
            raise FailedPrecondition(f"{what} does not exist", hint="create or mount it") from None
        if not stat.S_ISDIR(mode):
            raise FailedPrecondition(f"{what} is not a directory", hint="give the pool a directory")
        # Two first calls at once must not make two marks.
        with self._marking:
            self._check_mark(what)

    def _check_mark(self, what: str) -> None:
        mark, memory = records.read_record(self._directory / _MARK), records.read_record(self._memory)
        if memory is None:
            mark = mark or {"pool_id": secrets.token_hex(8)}
            records.write_record(self._directory / _MARK, mark)
            records.write_record(self._memory, {"pool_id": mark["pool_id"], "location": str(self._directory)})
        elif mark is None or mark.get("pool_id") != memory.get("pool_id"):
            raise FailedPrecondition(
                f"{what} is not the pool that was used before: {_MARK} is missing or differs",
                hint=f"mount the right file system; if the pool is a new one, remove {self._memory}",
            )

    def _usage(self) -> PoolUsage:
        self._check()
        system = os.statvfs(self._directory)
        free_bytes = system.f_bavail * system.f_frsize
        total_bytes = (system.f_blocks - system.f_bfree + system.f_bavail) * system.f_frsize
        volume_bytes = sum(allocated_bytes(path) for path in self._directory.glob(f"volumes/*/{IMAGE}"))
        snapshot_bytes = sum(allocated_bytes(path) for path in self._directory.glob(f"snapshots/*/{IMAGE}"))
        # Shared blocks count in every file that shares them, so what remains may come out below zero.
        foreign_bytes = max(0, total_bytes - free_bytes - volume_bytes - snapshot_bytes)
        return PoolUsage(total_bytes, foreign_bytes, snapshot_bytes)

    def _filler(self, source: Path, size_bytes: int, copying: Copying) -> Fill:
        def fill(target_fd: int) -> None:
            try:
                source_fd = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
            except FileNotFoundError:
                raise _missing(source) from None
            try:
                copy_image(source_fd, target_fd, size_bytes=size_bytes, copying=copying)
            finally:
                os.close(source_fd)

        return fill

    def _make_volume(self, volume: Volume, fill: Fill, copying: Copying) -> None:
        target = self._volume_image(volume.id).parent
        self._make(target, volume.capacity_bytes, volume_to_json(volume), fill, copying)

    def _make(
        self, target: Path, size_bytes: int, meta: dict[str, object], fill: Fill, copying: Copying
    ) -> None:
        self._check()
        if target.exists():
            return
        temporary = unfinished(target)
        temporary.mkdir(parents=True, mode=0o700)
        with ExitStack() as undo:
            undo.callback(remove_tree, temporary)
            image_fd = os.open(temporary / IMAGE, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            try:
                fill(image_fd)
                if os.fstat(image_fd).st_size != size_bytes:
                    os.ftruncate(image_fd, size_bytes)
                os.fsync(image_fd)
            finally:
                os.close(image_fd)
            records.write_record(temporary / _META, meta, make_directory=False)
            if copying.is_unwanted or time.monotonic() > copying.until_s + _COPY_GRACE_S / 2:
                # Nobody waits for this thread any more: an image now would belong to no record.
                raise DeadlineExceeded(f"{target} took too long", hint="the file system is slow or hangs")
            try:
                temporary.rename(target)
            except OSError as error:
                # A try that had been given up came to its end first; its image is whole.
                if error.errno not in _TARGET_EXISTS:
                    raise
            else:
                undo.pop_all()
        flush_directory(target.parent)

    def _expand(self, volume: Volume, capacity_bytes: int) -> None:
        self._verify(volume)
        image_fd = os.open(self._volume_image(volume.id), os.O_WRONLY | os.O_CLOEXEC)
        try:
            if os.fstat(image_fd).st_size < capacity_bytes:
                os.ftruncate(image_fd, capacity_bytes)
                os.fsync(image_fd)
        finally:
            os.close(image_fd)

    def _verify(self, volume: Volume) -> None:
        self._check()
        path = self._volume_image(volume.id)
        try:
            size_bytes = path.stat().st_size
        except FileNotFoundError:
            raise _missing(path) from None
        if size_bytes < volume.capacity_bytes:
            raise DataLoss(
                f"image {path} has {size_bytes} bytes, the volume has {volume.capacity_bytes}",
                hint="the file was truncated outside csi-vduse; restore it from a backup",
            )

    def _exists(self, path: Path) -> bool:
        self._check()
        return path.exists()

    def _delete(self, target: Path) -> None:
        self._check()
        temporary = unfinished(target)
        try:
            target.rename(temporary)
        except FileNotFoundError:
            return
        flush_directory(target.parent)
        remove_tree(temporary)

    def _leftovers(self) -> list[Path]:
        self._check()
        parts = ("volumes", "snapshots")
        return [path for part in parts for path in self._directory.glob(f"{part}/*{UNFINISHED}")]

    def _remove(self, paths: list[Path]) -> None:
        for path in paths:
            remove_tree(path)


def _missing(path: Path) -> DataLoss:
    return DataLoss(
        f"image {path} is missing", hint="it was removed outside csi-vduse; restore it from a backup"
    )
