"""The storage server's directory: image files and the record of each. Synchronous; runs in threads.

Layout: `pool.json` (the pool's id), `volumes/ID/{image.raw|image.qcow2,record.json}`, `snapshots/ID/` likewise.
A directory of an image appears whole, by renaming, and disappears whole; what ends in `.tmp` is unfinished or
unwanted, and `clean` removes it. The record is written before what it describes is done (model.py). The
image's own size is the truth about its size: the record's may be behind it after a crash.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import secrets
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from csi_vduse import log, records
from csi_vduse.errors import DataLoss, FailedPrecondition, InvalidArgument
from csi_vduse.files import UNFINISHED, allocated_bytes, flush_directory, remove_tree, unfinished
from csi_vduse.storage.model import Format, Image, Key, Kind, image_from_json, image_to_json

_RECORD = "record.json"
_MARK = "pool.json"
_LOCK = ".lock"
_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,27}")
_TARGET_EXISTS = (errno.EEXIST, errno.ENOTEMPTY)  # rename(2)
# QEMU, docs/interop/qcow2.txt: magic at byte 0, virtual size at byte 24, big-endian.
_QCOW2_HEAD = struct.Struct(">4s20xQ")
_QCOW2_MAGIC = b"QFI\xfb"


class Store:
    """See the module.

    Args:
        directory: exists; never made, since a missing one is most likely not mounted.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Have the directory for this process alone.

        Raises:
            FailedPrecondition: it is not there, or another storage server has it.
        """
        if not self._directory.is_dir():
            raise FailedPrecondition(f"{self._directory} is not a directory", hint="create or mount it")
        fd = os.open(self._directory / _LOCK, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise FailedPrecondition(
                    f"another storage server has {self._directory}", hint="stop it, or give another directory"
                ) from error
            yield
        finally:
            os.close(fd)

    def pool_id(self) -> str:
        """Return the pool's id; made with the first call."""
        mark = records.read_record(self._directory / _MARK)
        if mark is None:
            mark = {"pool_id": secrets.token_hex(8)}
            records.write_record(self._directory / _MARK, mark)
        return str(mark["pool_id"])

    def usage(self) -> tuple[int, int, int]:
        """Return the pool's size, what others occupy, and what snapshots occupy, in bytes."""
        system = os.statvfs(self._directory)
        total_bytes = (system.f_blocks - system.f_bfree + system.f_bavail) * system.f_frsize
        snapshot_bytes = sum(map(allocated_bytes, self._directory.glob("snapshots/*/image.*")))
        volume_bytes = sum(map(allocated_bytes, self._directory.glob("volumes/*/image.*")))
        free_bytes = system.f_bavail * system.f_frsize
        # Shared blocks count in every file that shares them, so what remains may come out below zero.
        return total_bytes, max(0, total_bytes - free_bytes - snapshot_bytes - volume_bytes), snapshot_bytes

    def find(self, key: Key) -> Image | None:
        """Return what the record says of an image, or None if there is none.

        Raises:
            DataLoss: the record is damaged, or the directory has none.
        """
        directory = self._path(key)
        record = records.read_record(directory / _RECORD)
        if record is None:
            if directory.exists():
                raise DataLoss(f"{directory} has no record", hint="restore it from a backup, or move it away")
            return None
        return image_from_json(record)

    def list(self, kind: Kind) -> list[Image]:
        """Return all images of a kind; one that vanishes meanwhile, or whose record is damaged, is left out."""
        found = []
        for name in sorted(path.name for path in self._directory.glob(f"{kind.value}/*")):
            if not _ID.fullmatch(name):
                continue
            try:
                image = self.find(Key(kind, name))
            except DataLoss as error:
                log.get().error("an image is left out", kind=kind.value, id=name, error=str(error))
                continue
            if image is not None:
                found.append(image)
        return found

    def save(self, image: Image) -> None:
        """Write the record of an image that is there."""
        records.write_record(self._path(image.key) / _RECORD, image_to_json(image))

    def image_path(self, image: Image) -> Path:
        """Return where the image's file is."""
        return self._path(image.key) / _file_name(image.format)

    def prepare(self, image: Image) -> Path:
        """Make an unfinished directory for an image and return where its file belongs."""
        directory = unfinished(self._path(image.key))
        directory.mkdir(parents=True, mode=0o700)
        return directory / _file_name(image.format)

    def finish(self, image: Image, path: Path) -> None:
        """Let the image whose file is at `path`, as `prepare` gave it, appear; a twin that came first wins."""
        directory = path.parent
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
        records.write_record(directory / _RECORD, image_to_json(image))
        target = self._path(image.key)
        try:
            directory.rename(target)
        except OSError as error:
            if error.errno not in _TARGET_EXISTS:
                raise
            remove_tree(directory)
        flush_directory(target.parent)

    def discard(self, path: Path) -> None:
        """Remove what `prepare` made."""
        remove_tree(path.parent)

    def delete(self, key: Key) -> None:
        """Remove an image and its record; fine if they are gone."""
        target = self._path(key)
        unwanted = unfinished(target)
        try:
            target.rename(unwanted)
        except FileNotFoundError:
            return
        flush_directory(target.parent)
        remove_tree(unwanted)

    def clean(self) -> None:
        """Remove what interrupted calls left."""
        for kind in Kind:
            for path in self._directory.glob(f"{kind.value}/*{UNFINISHED}"):
                remove_tree(path)

    def allocated_bytes(self, image: Image) -> int:
        """Return what an image occupies."""
        return allocated_bytes(self.image_path(image))

    def refreshed(self, image: Image) -> Image:
        """Return the image with the size that its file has.

        Raises:
            DataLoss: the file is missing, or not of the image's format.
        """
        path = self.image_path(image)
        try:
            if image.format is Format.RAW:
                return replace(image, size_bytes=path.stat().st_size)
            with path.open("rb") as file:
                head = file.read(_QCOW2_HEAD.size)
        except FileNotFoundError as error:
            raise DataLoss(
                f"image {path} is missing", hint="it was removed outside csi-vduse; restore it from a backup"
            ) from error
        if len(head) < _QCOW2_HEAD.size or not head.startswith(_QCOW2_MAGIC):
            raise DataLoss(f"{path} is not a qcow2 image", hint="restore it from a backup")
        return replace(image, size_bytes=int(_QCOW2_HEAD.unpack(head)[1]))

    def _path(self, key: Key) -> Path:
        if not _ID.fullmatch(key.id):
            raise InvalidArgument(f"id {key.id[:40]!r} is not 1 to 28 of a-z, 0-9 and '-'")
        return self._directory / key.kind.value / key.id


def _file_name(image_format: Format) -> str:
    return f"image.{image_format.value}"
