"""What a new volume is to be, and whether an existing one is what is asked for: pure decisions.

Used where the pool is (provisioning.py) and where it is not (remote.py), so that both answer alike.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import TypeVar

from csi_vduse.errors import AlreadyExists, InvalidArgument, OutOfRange
from csi_vduse.services.validation import CreateVolume, ExpandVolume
from csi_vduse.volumes import sizes
from csi_vduse.volumes.model import FilesystemState, Snapshot, State, Volume, record_of_copy
from csi_vduse.volumes.policy import Use, is_shared, objection
from csi_vduse.volumes.topology import Segments, satisfies

Copied = TypeVar("Copied", Volume, Snapshot)


def new_volume(
    volume_id: str,
    request: CreateVolume,
    *,
    source: Volume | Snapshot | None,
    pool: str,
    backend: str,
    node: str = "",
) -> Volume:
    """Decide what the new volume is to be.

    Args:
        volume_id: of its name.
        request: what is asked.
        source: what it is filled from, if anything; in the same pool.
        pool: where it is made.
        backend: kind of that pool.
        node: that the pool is on; empty: see Volume.node.

    Raises:
        InvalidArgument, OutOfRange: the request can never work.
    """
    source_bytes = size_bytes(source)
    volume = Volume(
        id=volume_id,
        name=request.name,
        pool=pool,
        backend=backend,
        capacity_bytes=sizes.choose(
            request.wanted,
            smallest_bytes=max(sizes.floor_bytes(use.filesystem for use in request.uses), source_bytes),
            default_bytes=source_bytes or sizes.DEFAULT_BYTES,
        ),
        parameters=request.asked.resolve(block_size_bytes(source)),
        source=request.source,
        filesystem=record_of_copy(source.filesystem) if source else None,
        state=State.CREATING,
        created_at_ns=time.time_ns(),
        throttle=request.asked.throttle,
        node=node,
    )
    require_possible(request.uses, volume)
    return volume


def require_source_in(source: Volume | Snapshot | None, pool: str) -> None:
    """Refuse a copy that would leave the pool of its source.

    Raises:
        InvalidArgument: it would.
    """
    if source is not None and source.pool != pool:
        raise InvalidArgument(
            f"parameter pool: the source {source.id} is in pool {source.pool!r}, not {pool!r}",
            hint="a clone or restored snapshot stays in the pool of its source",
        )


def require_same(
    existing: Volume, request: CreateVolume, *, default_pool: str | None, segments: Segments
) -> None:
    """Refuse a request whose name is taken by another kind of volume.

    Args:
        existing: the volume of that name.
        request: what is asked.
        default_pool: where it would go if it names no pool.
        segments: where the existing volume can be used.

    Raises:
        AlreadyExists: says in what they differ.
    """
    differences = [
        request.asked.difference(existing.pool, existing.parameters, inherits=existing.source is not None)
    ]
    if request.asked.pool is None and existing.source is None:
        differences.append(
            f"pool {existing.pool!r}, not {default_pool!r}" if existing.pool != default_pool else ""
        )
    if not request.wanted.allows(existing.capacity_bytes):
        differences.append(
            f"capacity {existing.capacity_bytes}, not {request.wanted.required_bytes} to "
            f"{request.wanted.limit_bytes or 'any'}"
        )
    if existing.source != request.source:
        differences.append("another source")
    if not is_shared(existing.backend) and not satisfies(request.requirement, segments):
        differences.append("another topology")
    differences.append(mismatch(existing, request.uses))
    text = "; ".join(difference for difference in differences if difference)
    if text:
        raise AlreadyExists(
            f"volume {request.name!r} exists and differs: {text}",
            hint="use another name, or delete it first",
        )


def is_same_begun(existing: Copied, planned: Copied) -> bool:
    """Tell whether an unfinished volume or snapshot is what is planned now, so that a copy under way is the right one.

    What its record says of the content was read before the copy was begun, and stays.
    """
    return existing == replace(
        planned,
        created_at_ns=existing.created_at_ns,
        filesystem=existing.filesystem,
        node=existing.node,
    )


def grown_bytes(volume: Volume, request: ExpandVolume) -> int:
    """Return the capacity that a volume is to have: what it has, if that is enough.

    Raises:
        InvalidArgument: it cannot be used as the request says.
        OutOfRange: it is larger than the limit, and volumes do not shrink; or no size fits.
    """
    if request.use is not None:
        require_possible((request.use,), volume)
    if volume.capacity_bytes < request.wanted.required_bytes:
        return sizes.choose(
            request.wanted, smallest_bytes=volume.capacity_bytes, default_bytes=volume.capacity_bytes
        )
    if not request.wanted.allows(volume.capacity_bytes):
        raise OutOfRange(
            f"volume {volume.id} has {volume.capacity_bytes} bytes, the limit is "
            f"{request.wanted.limit_bytes}; volumes do not shrink"
        )
    return volume.capacity_bytes


def mismatch(volume: Volume, uses: tuple[Use, ...]) -> str:
    """Say why a volume cannot be used so, or nothing if it can."""
    reasons = (
        objection(use, backend=volume.backend, bus=volume.parameters.bus) or _other_filesystem(use, volume)
        for use in uses
    )
    return next((reason for reason in reasons if reason), "")


def _other_filesystem(use: Use, volume: Volume) -> str:
    """Say that a volume carries another file system; what it is while it is being made is the node's to say."""
    found = volume.filesystem
    if found is None or found.state is not FilesystemState.FORMATTED or use.filesystem in {None, found.type}:
        return ""
    return f"the volume, or what it is a copy of, is formatted as {found.type}, not as {use.filesystem}"


def require_possible(uses: tuple[Use, ...], volume: Volume) -> None:
    """Refuse uses that a volume can never have.

    Raises:
        InvalidArgument: says which and why.
    """
    reason = mismatch(volume, uses)
    if reason:
        raise InvalidArgument(reason)


def size_bytes(source: Volume | Snapshot | None) -> int:
    """Return how large a copy has to be at least."""
    match source:
        case Volume():
            return source.capacity_bytes
        case Snapshot():
            return source.size_bytes
    return 0


def block_size_bytes(source: Volume | Snapshot | None) -> int | None:
    """Return the block size that a copy takes over, or None without a source."""
    match source:
        case Volume():
            return source.parameters.block_size_bytes
        case Snapshot():
            return source.block_size_bytes
    return None
