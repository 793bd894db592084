"""How fast a volume may be: a value that travels from StorageClass or command line to the engine (src/throttle.c)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final

from csi_vduse.errors import InvalidArgument

DEFAULT_BURST_S: Final = 0.1
# The engine computes in nanoseconds for one request and for one byte: beyond these a limit would be imprecise.
MAX_IOPS: Final = 10**7
MAX_BYTES_PER_S: Final = 1 << 36
# Less than a page a second leaves a disk that looks dead.
MIN_BYTES_PER_S: Final = 4096
# A burst below this is lost to the time that waking up takes, and the rate with it.
MIN_BURST_S: Final = 0.01
MAX_BURST_S: Final = 3600.0


@dataclass(frozen=True)
class Throttle:
    """What all queues of a volume together may start in a second.

    Args:
        iops: requests, whatever their size; 0: no limit.
        bytes_per_s: bytes of reads and writes; 0: no limit.
        burst_s: a volume that was idle may at once use what it did not use for this long.

    Raises:
        InvalidArgument: a value out of range; names it and what is allowed.
    """

    iops: int = 0
    bytes_per_s: int = 0
    burst_s: float = DEFAULT_BURST_S

    def __post_init__(self) -> None:
        """Refuse what the engine cannot keep."""
        if not 0 <= self.iops <= MAX_IOPS:
            raise InvalidArgument(f"{self.iops} requests per second; allowed: 0 (no limit) to {MAX_IOPS}")
        if self.bytes_per_s and not MIN_BYTES_PER_S <= self.bytes_per_s <= MAX_BYTES_PER_S:
            raise InvalidArgument(
                f"{self.bytes_per_s} bytes per second; allowed: 0 (no limit), "
                f"or {MIN_BYTES_PER_S} to {MAX_BYTES_PER_S}"
            )
        if not math.isfinite(self.burst_s) or not MIN_BURST_S <= self.burst_s <= MAX_BURST_S:
            raise InvalidArgument(
                f"a burst of {self.burst_s:g} s; allowed: {MIN_BURST_S:g} to {MAX_BURST_S:g}"
            )


UNLIMITED: Final = Throttle()


def to_json(throttle: Throttle) -> dict[str, Any]:
    """Encode for the control channel and for records."""
    return {"iops": throttle.iops, "bytes_per_s": throttle.bytes_per_s, "burst_s": throttle.burst_s}


def from_json(value: dict[str, Any] | None) -> Throttle:
    """Decode what `to_json` made; None, as in what older versions wrote, is no limit.

    Raises:
        InvalidArgument: a value out of range.
        KeyError, TypeError, ValueError: not ours.
    """
    if value is None:
        return UNLIMITED
    return Throttle(int(value["iops"]), int(value["bytes_per_s"]), float(value["burst_s"]))
