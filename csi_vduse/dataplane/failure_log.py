"""What a worker logs of requests that failed, or that wait for a backend that is full or away.

Each is logged with how many there were since the last time, and the newest as an example; who calls decides how often.
"""

from __future__ import annotations

from typing import Any

from csi_vduse import log
from csi_vduse.dataplane.engine import Engine, Failure


class FailureLog:
    """What has been logged so far."""

    def __init__(self) -> None:
        self._failed = 0
        self._waited = 0

    def tell(self, engine: Engine) -> None:
        """Log what is new."""
        newest = engine.failure()
        if newest is None:
            return
        if newest.count > self._failed:
            log.get().error("requests failed", requests=newest.count - self._failed, **_example(newest))
        if newest.waits > self._waited:
            log.get().error(
                "requests wait: their backend is full or away",
                requests=newest.waits - self._waited,
                **_example(newest),
                hint="make room, or bring it back: they go on by themselves",
            )
        self._failed, self._waited = newest.count, newest.waits


def _example(newest: Failure) -> dict[str, Any]:
    return {"operation": newest.operation, "offset_bytes": newest.offset_bytes, "error": newest.error}
