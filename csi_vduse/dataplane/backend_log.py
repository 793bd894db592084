"""What is logged of a backend and of queues that stopped.

Requests that failed, or that wait for their backend because it is full or away, are logged with how many there were since
the last time, and the newest as an example; a connection when it is another than before. Who calls decides how often.
"""

from __future__ import annotations

from typing import Any, Final

from csi_vduse import log
from csi_vduse.dataplane.engine import Engine, Failure
from csi_vduse.dataplane.vhost_user.mediator import Mediator
from csi_vduse.dataplane.vhost_user.relay import Relay


class BackendLog:
    """What has been logged so far."""

    def __init__(self) -> None:
        self._failed = 0
        self._waited = 0
        self._connection = ("connected", "")

    def tell(self, engine: Engine | Relay | Mediator) -> None:
        """Log what is new."""
        self._tell_requests(engine)
        self._tell_connection(engine)

    def _tell_requests(self, engine: Engine | Relay | Mediator) -> None:
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

    def _tell_connection(self, engine: Engine | Relay | Mediator) -> None:
        status = engine.backend_status()
        if status is None or (status.state, status.reason) == self._connection:
            return
        self._connection = (status.state, status.reason)
        if status.state == "connected":
            log.get().info("connected to the server")
        else:
            log.get().warning(
                "no connection to the server; requests wait", state=status.state, reason=status.reason
            )


def tell_fault(queue: int, fault: str) -> None:
    """Log that a queue has stopped, and whose doing that is: most faults are the driver's, some are ours or memory's."""
    told, hint = _NOT_THE_DRIVERS.get(fault, ("the driver broke the ring's rules", "it needs a reset"))
    log.get().error(f"queue stopped: {told}", queue=queue, fault=fault, hint=hint)


_NOT_THE_DRIVERS: Final = {
    "memory": ("memory of the driver's went away", "it needs a reset"),
    "io_uring": (
        "its io_uring could not be set up",
        "see `csi-vduse doctor`; a new worker, or a reset, tries again",
    ),
    "in-flight-log": ("its in-flight log is not one of this queue", "detach the volume and attach it again"),
}


def _example(newest: Failure) -> dict[str, Any]:
    return {"operation": newest.operation, "offset_bytes": newest.offset_bytes, "error": newest.error}
