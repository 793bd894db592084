"""Around every call: log lines with ids, a measurement, and errors as gRPC statuses. The one place for each.

Nothing of a request is logged but the names in LOGGED: secrets, contexts and mount flags cannot leak. A
status carries the message and the hint; an error that is not ours is INTERNAL, with its traceback in the log
only.
"""
# ruff: noqa: ANN401 - interceptors see messages of every type

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import grpc
import structlog

from csi_vduse import log
from csi_vduse.errors import VduseError
from csi_vduse.services.rpc import method_name, rewrapped_with_context

# Method, code and duration in seconds of an ended call.
Observe = Callable[[str, str, float], None]

LOGGED = ("volume_id", "name", "snapshot_id", "source_volume_id", "staging_target_path", "target_path")
_QUIET_PREFIXES = ("Get", "List", "NodeGet", "ControllerGet", "Probe", "Validate")
# Statuses that say "not now" or "not so", not "we failed".
_LOUD_CODES = frozenset({"INTERNAL", "UNKNOWN", "DATA_LOSS"})
_MAX_DETAIL_CHARS = 3000  # gRPC's trailers hold 8 KiB by default


class StatusInterceptor(grpc.aio.ServerInterceptor):
    """Wraps every service.

    Args:
        observe: is told of every ended call.
    """

    def __init__(self, observe: Observe | None = None) -> None:
        self._observe = observe

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Any]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        """Return the method's handler with all this around it."""
        method = method_name(handler_call_details)

        async def around(behaviour: Callable[[], Awaitable[Any]], request: Any, context: Any) -> Any:
            structlog.contextvars.bind_contextvars(rpc=method, **_names(request))
            begun_s = time.monotonic()
            code, text = "OK", ""
            try:
                return await behaviour()
            except asyncio.CancelledError:
                code, text = "CANCELLED", "the caller has gone; what was begun is carried to its end"
                raise
            except VduseError as error:
                code, text = error.grpc_code, str(error)
            except NotImplementedError:
                code, text = "UNIMPLEMENTED", f"{method} is not offered by this driver"
            except Exception:  # noqa: BLE001 - the edge: whatever it is, the caller gets a status
                code, text = "INTERNAL", f"{method} failed unexpectedly; the log of csi-vduse has the details"
                log.get().exception("unexpected error")
            finally:
                self._ended(method, code, text, time.monotonic() - begun_s)
            return await context.abort(grpc.StatusCode[code], text[:_MAX_DETAIL_CHARS])

        return rewrapped_with_context(await continuation(handler_call_details), around)

    def _ended(self, method: str, code: str, text: str, duration_s: float) -> None:
        if self._observe is not None:
            self._observe(method, code, duration_s)
        fields: dict[str, Any] = {"code": code, "duration_s": round(duration_s, 3)}
        if text:
            fields["error"] = text
        logger = log.get()
        if code in _LOUD_CODES:
            logger.error("call failed", **fields)
        elif code != "OK":
            logger.warning("call refused", **fields)
        elif method.startswith(_QUIET_PREFIXES):
            logger.debug("call", **fields)
        else:
            logger.info("call", **fields)


def _names(request: Any) -> dict[str, str]:
    """Return the ids and paths of a request; nothing else of it may reach a log."""
    known = request.DESCRIPTOR.fields_by_name
    return {field: getattr(request, field) for field in LOGGED if field in known and getattr(request, field)}
