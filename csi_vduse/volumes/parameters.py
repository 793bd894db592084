"""StorageClass parameters: read, checked, and completed with defaults. Pure.

A parameter that is not given stays None until `resolve`, because a clone takes some of them from its source.
Those of the throttle are mutable: a VolumeAttributesClass may set and change them too.
docs/parameters.md describes each for users.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from csi_vduse.config import parse_size
from csi_vduse.dataplane.config_space import BLOCK_SIZES
from csi_vduse.dataplane.device import MAX_QUEUE_SIZE
from csi_vduse.dataplane.throttle import MAX_IOPS, UNLIMITED, Throttle
from csi_vduse.errors import InvalidArgument
from csi_vduse.vdpa.model import Bus
from csi_vduse.volumes.model import VolumeParameters

# One thread each, and a node has many volumes: more than this serves nobody.
MAX_QUEUES = 16
_QUEUE_SIZES = tuple(1 << power for power in range(2, MAX_QUEUE_SIZE.bit_length()))
# What the sidecars add or consume themselves: names of the claim, secrets, the file system type.
_SIDECAR_PREFIX = "csi.storage.k8s.io/"
_DECIMAL = re.compile(r"[0-9]{1,6}(\.[0-9]{1,6})?")


@dataclass(frozen=True)
class AskedParameters:
    """What the caller asked for; None: nothing."""

    pool: str | None = None
    bus: Bus | None = None
    queues: int | None = None
    queue_size: int | None = None
    block_size_bytes: int | None = None
    throttle: Throttle = UNLIMITED

    def resolve(self, source_block_size_bytes: int | None = None) -> VolumeParameters:
        """Return the settings of a new volume.

        Args:
            source_block_size_bytes: block size of what the volume is filled from, if anything; a file system
                made for it is in there, so it is the default.

        Raises:
            InvalidArgument: the asked block size is larger than the source's: its file system could not be
                read with it.
        """
        block_size_bytes = (
            self.block_size_bytes or source_block_size_bytes or VolumeParameters.block_size_bytes
        )
        if source_block_size_bytes and block_size_bytes > source_block_size_bytes:
            raise InvalidArgument(
                f"parameter blockSize: {block_size_bytes} exceeds the source's {source_block_size_bytes}",
                hint="use the source's block size or a smaller one",
            )
        return VolumeParameters(
            bus=self.bus or VolumeParameters.bus,
            queues=self.queues or VolumeParameters.queues,
            queue_size=self.queue_size or VolumeParameters.queue_size,
            block_size_bytes=block_size_bytes,
        )

    def difference(self, pool: str, existing: VolumeParameters, *, inherits: bool) -> str:
        """Say in what an existing volume differs from what is asked, or nothing.

        Args:
            pool: the existing volume's pool.
            existing: its settings.
            inherits: it has a source, so that a block size that was not asked for matches any.
        """
        block_size_bytes = self.block_size_bytes or (existing.block_size_bytes if inherits else None)
        wanted = AskedParameters(
            self.pool, self.bus, self.queues, self.queue_size, block_size_bytes
        ).resolve()
        pairs = {
            "pool": (self.pool or pool, pool),
            "bus": (wanted.bus.value, existing.bus.value),
            "queues": (wanted.queues, existing.queues),
            "queueSize": (wanted.queue_size, existing.queue_size),
            "blockSize": (wanted.block_size_bytes, existing.block_size_bytes),
        }
        return ", ".join(
            f"{key} {has!r}, not {asked!r}" for key, (asked, has) in pairs.items() if asked != has
        )


def parse(parameters: Mapping[str, str]) -> AskedParameters:
    """Read a StorageClass's parameters.

    Raises:
        InvalidArgument: an unknown parameter or a bad value; names it and what is allowed.
    """
    own = {key: value for key, value in parameters.items() if not key.startswith(_SIDECAR_PREFIX)}
    for key in own:
        if key not in _KNOWN:
            raise InvalidArgument(f"unknown parameter {key!r}; allowed: {', '.join(_KNOWN)}")
    return AskedParameters(
        pool=_text("pool", own["pool"]) if "pool" in own else None,
        bus=_bus(own["bus"]) if "bus" in own else None,
        queues=_number("queues", own, lambda n: 1 <= n <= MAX_QUEUES, f"1 to {MAX_QUEUES}"),
        queue_size=_number("queueSize", own, _QUEUE_SIZES.__contains__, _listed(_QUEUE_SIZES)),
        block_size_bytes=_number("blockSize", own, BLOCK_SIZES.__contains__, _listed(BLOCK_SIZES)),
        throttle=_throttle(own, UNLIMITED),
    )


def parse_mutable(parameters: Mapping[str, str], before: Throttle = UNLIMITED) -> Throttle:
    """Read a VolumeAttributesClass's parameters; what they do not name stays as before.

    Raises:
        InvalidArgument: an unknown parameter or a bad value; names it and what is allowed.
    """
    for key in parameters:
        if key not in MUTABLE:
            raise InvalidArgument(f"parameter {key!r} is not mutable; allowed: {', '.join(MUTABLE)}")
    return _throttle(parameters, before)


MUTABLE = ("maxIops", "maxBandwidth", "burstSeconds")
# Those of a volume_context (context.py) that describe the device.
VOLUME_CONTEXT_PARAMETERS = ("bus", "queues", "queueSize", "blockSize")
_KNOWN = ("pool", "bus", "queues", "queueSize", "blockSize", *MUTABLE)


def _throttle(own: Mapping[str, str], before: Throttle) -> Throttle:
    iops = _number("maxIops", own, lambda n: 0 <= n <= MAX_IOPS, f"0 (no limit) to {MAX_IOPS}")
    bandwidth, burst = own.get("maxBandwidth"), own.get("burstSeconds")
    if burst is not None and not _DECIMAL.fullmatch(burst):
        raise InvalidArgument(f"parameter burstSeconds: {burst!r} is not allowed; allowed: a decimal number")
    try:
        return Throttle(
            iops=before.iops if iops is None else iops,
            bytes_per_s=before.bytes_per_s if bandwidth is None else parse_size(bandwidth),
            burst_s=before.burst_s if burst is None else float(burst),
        )
    except InvalidArgument as error:
        raise InvalidArgument(f"parameters {', '.join(MUTABLE)}: {error.message}", hint=error.hint) from error


def _text(key: str, value: str) -> str:
    if not value:
        raise InvalidArgument(f"parameter {key} is empty; give a name or leave it out")
    return value


def _bus(value: str) -> Bus:
    try:
        return Bus(value)
    except ValueError:
        raise InvalidArgument(
            f"parameter bus: {value!r} is not allowed; allowed: {_listed(bus.value for bus in Bus)}"
        ) from None


def _number(key: str, own: Mapping[str, str], allowed: Callable[[int], bool], range_text: str) -> int | None:
    if key not in own:
        return None
    text = own[key]
    # int() would take "1_6", " 16" and digits of other scripts.
    number = int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
    if not allowed(number):
        raise InvalidArgument(f"parameter {key}: {text!r} is not allowed; allowed: {range_text}")
    return number


def _listed(values: Iterable[object]) -> str:
    return ", ".join(str(value) for value in values)
