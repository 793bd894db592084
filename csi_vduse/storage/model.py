"""What the storage server knows of its images, as values, and their JSON form. Nothing here acts.

A publication is the right of one node to use a volume: an epoch, which grows with every publication of the
volume, and an export of its own, which is replaced by another one, of a later epoch, when the node asks for that. An
export's name is never used again: it holds the epoch, and a random part that tells apart two volumes that had one name,
one after the other.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass
from enum import Enum
from typing import Any

from csi_vduse.errors import DataLoss

# A volume that several nodes may write is a VM's disk that moves: source and target, nobody else.
MAX_WRITERS = 2


class Format(Enum):
    """How an image file is laid out."""

    RAW = "raw"
    QCOW2 = "qcow2"


class Kind(Enum):
    """What an image is; also the name of the directory that it is in."""

    VOLUME = "volumes"
    SNAPSHOT = "snapshots"


@dataclass(frozen=True)
class Key:
    """Which image."""

    kind: Kind
    id: str


@dataclass(frozen=True)
class Publication:
    """One node's right to a volume.

    Args:
        node_id: whose.
        epoch: that the node was told; the volume's first is 1.
        export: that the node was told; it is known by that for as long as it has the volume.
        read_only: the export refuses writes.
        shared: another node may be given write access beside this one.
        served: the export that there is now: name at the NBD server, and id there. At first `export` itself.
        served_epoch: of that.
        replaced: what `served` takes the place of, while it may still be there: `served` is opened when it is closed.
        closing: it has been taken back; written before the export is closed, and the record goes after it.
    """

    node_id: str
    epoch: int
    export: str
    read_only: bool
    shared: bool
    served: str
    served_epoch: int
    replaced: str = ""
    closing: bool = False

    @property
    def exports(self) -> tuple[str, ...]:
        """Every export of it that a daemon may have."""
        return tuple(filter(None, (self.served, self.replaced)))


@dataclass(frozen=True)
class Image:
    """One volume or snapshot.

    Args:
        key: which.
        format: of its file.
        size_bytes: what a guest sees.
        epoch: of the latest publication; 0 if there was none.
        publications: open ones and those being closed.
        source: what it is a copy of; None: of nothing, or of what a release recorded that did not record it.
        cut_at_ns: the moment of a copy's content, since 1970.
    """

    key: Key
    format: Format
    size_bytes: int
    epoch: int = 0
    publications: tuple[Publication, ...] = ()
    source: Key | None = None
    cut_at_ns: int = 0

    def of_node(self, node_id: str) -> Publication | None:
        """Return the node's publication, if it has one."""
        return next((one for one in self.publications if one.node_id == node_id), None)

    def of_export(self, export: str) -> Publication | None:
        """Return the publication that a node was told by this name, unless it was taken back."""
        return next((one for one in self.publications if one.export == export and not one.closing), None)


def new_export(volume_id: str, epoch: int) -> str:
    """Return a name for an export that no other export has had, and that nobody can guess."""
    return f"{volume_id}.{epoch}.{secrets.token_hex(8)}"


def volume_of(export: str) -> Key:
    """Return which volume an export is of, by its name; nonsense for a name that is not one of ours."""
    return Key(Kind.VOLUME, export.partition(".")[0])


def image_to_json(image: Image) -> dict[str, Any]:
    """Encode for a record."""
    return {
        "id": image.key.id,
        "kind": image.key.kind.value,
        "format": image.format.value,
        "size_bytes": image.size_bytes,
        "epoch": image.epoch,
        "publications": [vars(one) for one in image.publications],
        "source": {"kind": image.source.kind.value, "id": image.source.id} if image.source else None,
        "cut_at_ns": image.cut_at_ns,
    }


def image_from_json(record: dict[str, Any]) -> Image:
    """Decode what `image_to_json` made.

    Raises:
        DataLoss: a field is missing or has a value that we never write.
    """
    try:
        source = record.get("source")
        return Image(
            key=Key(Kind(record["kind"]), str(record["id"])),
            format=Format(record["format"]),
            size_bytes=int(record["size_bytes"]),
            epoch=int(record["epoch"]),
            publications=tuple(_publication_from_json(one) for one in record["publications"]),
            source=Key(Kind(source["kind"]), str(source["id"])) if source else None,
            cut_at_ns=int(record.get("cut_at_ns", 0)),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DataLoss(
            f"record of image {record.get('id', '?')!r} is damaged: {error!r}",
            hint="restore the file from a backup of the storage server's directory",
        ) from error


def _publication_from_json(record: dict[str, Any]) -> Publication:
    # Releases that could not renew an export recorded one only.
    return Publication(**{"served": record["export"], "served_epoch": record["epoch"], **record})


def objection(image: Image, *, node_id: str, read_only: bool, shared: bool) -> str:
    """Say why a node cannot have the volume beside those that have it, or nothing if it can. Pure.

    The rules: readers go together, a writer is alone, and two writers are possible only if both were asked
    for as shared, which is how a VM's disk moves from one node to the next (the source stops writing before
    the target starts; the hypervisor sees to that, nothing here does).
    """
    others = [one for one in image.publications if one.node_id != node_id]
    if not others:
        return ""
    names = ", ".join(sorted(one.node_id for one in others))
    if read_only and all(one.read_only for one in others):
        return ""
    if read_only or any(one.read_only for one in others):
        return f"it is published at {names}, and readers and writers do not go together"
    if not shared or not all(one.shared for one in others):
        return f"it is published at {names}, and one node at a time may write it"
    if len(others) >= MAX_WRITERS:
        return (
            f"it is published at {names}; {MAX_WRITERS} nodes at most have a shared volume, the source and the "
            "target of a VM's migration"
        )
    return ""
