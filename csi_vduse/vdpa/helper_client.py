"""Our side of the netlink helper: starts it, bounds every call, replaces it when it misses a deadline.

Kept true: one call at a time; after a missed deadline or a broken pipe the helper is killed and the next call
starts a new one, which first mends what the dead one may have left (autoprobe.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import sys
from pathlib import Path
from typing import Any

from csi_vduse import log
from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    NotFound,
    PermissionDenied,
    Unavailable,
    VduseError,
)
from csi_vduse.vdpa.autoprobe import Autoprobe
from csi_vduse.vdpa.sysfs import Sysfs

# Importing pyroute2 takes 0.2 s on hardware and 10 s in an emulated machine.
_START_TIMEOUT_S = 90.0
_KILL_GRACE_S = 2.0


class NetlinkHelper:
    """Asynchronous calls of the kernel's vdpa family.

    Args:
        run_dir: on tmpfs; the autoprobe marker lives there.
        argv: the helper program; replaced in tests.
    """

    def __init__(
        self, run_dir: Path, *, argv: tuple[str, ...] | None = None, sysfs: Sysfs | None = None
    ) -> None:
        marker = run_dir / "autoprobe-off"
        sysfs = sysfs or Sysfs()
        self._argv = argv or (sys.executable, "-m", "csi_vduse.vdpa.helper", str(marker))
        self._autoprobe = Autoprobe(sysfs.bus_dir / "drivers_autoprobe", marker, lock_timeout_s=1.0)
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start the helper ahead of the first call; mends what a killed one left."""
        async with self._lock:
            await self._ensure()

    async def close(self) -> None:
        """End the helper."""
        async with self._lock:
            await self._kill()

    async def add(self, name: str, driver: str, *, timeout_s: float) -> None:
        """Put a VDUSE device on the bus, bound to nothing, reserved for `driver`.

        Raises:
            AlreadyExists: a device of this name is on the bus.
            FailedPrecondition: no such VDUSE device, not ready, or no vdpa module or family.
            PermissionDenied: CAP_NET_ADMIN is missing.
            DeadlineExceeded: the kernel did not answer; the helper was killed.
        """
        await self._call({"op": "add", "name": name, "driver": driver}, timeout_s)

    async def remove(self, name: str, *, timeout_s: float) -> None:
        """Take a device off the bus; fine if it is not there. Raises as `add`."""
        with contextlib.suppress(NotFound):
            await self._call({"op": "remove", "name": name}, timeout_s)

    async def devices(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """Devices on the bus. Raises as `add`."""
        result: list[dict[str, Any]] = await self._call({"op": "devices"}, timeout_s)
        return result

    async def management_devices(self, *, timeout_s: float) -> list[dict[str, Any]]:
        """Management devices; "vduse" is among them when its module is loaded. Raises as `add`."""
        result: list[dict[str, Any]] = await self._call({"op": "management_devices"}, timeout_s)
        return result

    async def configuration(self, name: str, *, timeout_s: float) -> dict[str, Any]:
        """What the driver negotiated. Raises as `add`, and Unavailable before it has."""
        result: dict[str, Any] = await self._call({"op": "configuration", "name": name}, timeout_s)
        return result

    async def _call(self, request: dict[str, Any], timeout_s: float) -> Any:  # noqa: ANN401 - as JSON gives it
        async with self._lock:
            process = await self._ensure()
            try:
                async with asyncio.timeout(timeout_s):
                    answer = await self._exchange(process, json.dumps(request).encode() + b"\n")
            except BaseException as error:
                # The answer may still come and would be taken for the next call's.
                await self._kill()
                if isinstance(error, TimeoutError):
                    raise DeadlineExceeded(
                        f"netlink {request['op']} {request.get('name', '')} took more than {timeout_s:g} s",
                        hint="another vDPA device may hold the kernel's lock; see the kernel log",
                    ) from error
                raise
        if answer["ok"]:
            return answer["result"]
        raise _error(request, answer["errno"], answer["message"])

    async def _exchange(self, process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any]:
        if process.stdin is None or process.stdout is None:
            raise VduseError("the netlink helper has no pipes")
        try:
            if line:
                process.stdin.write(line)
                await process.stdin.drain()
            reply = await process.stdout.readline()
        except (BrokenPipeError, ConnectionResetError):
            reply = b""
        if not reply:
            raise Unavailable(
                "the netlink helper ended unexpectedly", hint="see its messages above in the log"
            )
        answer: dict[str, Any] = json.loads(reply)
        return answer

    async def _ensure(self) -> asyncio.subprocess.Process:
        if self._process is not None and self._process.returncode is None:
            return self._process
        with contextlib.suppress(DeadlineExceeded, OSError):
            if self._autoprobe.recover():
                log.get().warning("autoprobe of the vDPA bus restored after a killed helper")
        self._process = await asyncio.create_subprocess_exec(
            *self._argv, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, start_new_session=True
        )
        try:
            async with asyncio.timeout(_START_TIMEOUT_S):
                await self._exchange(self._process, b"")
        except BaseException as error:
            await self._kill()
            if isinstance(error, TimeoutError):
                raise Unavailable(
                    f"the netlink helper did not start within {_START_TIMEOUT_S:g} s"
                ) from error
            raise
        return self._process

    async def _kill(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(asyncio.shield(process.wait()), _KILL_GRACE_S)
        if process.stdin is not None:
            process.stdin.close()
        with contextlib.suppress(DeadlineExceeded, OSError):
            self._autoprobe.recover()


def _error(request: dict[str, Any], number: int, message: str) -> VduseError:
    name = request.get("name", "")
    what = f"netlink {request['op']} {name}".strip()
    match number:
        case errno.EEXIST:
            error: VduseError = AlreadyExists(f"a vDPA device named {name!r} exists that is not ours")
        case errno.ENODEV if request["op"] == "remove":
            error = NotFound(f"no vDPA device named {name!r}")
        case errno.EPERM | errno.EACCES:
            error = PermissionDenied(
                f"{what}: {message}", hint="needs root with CAP_NET_ADMIN in the host's network namespace"
            )
        case errno.ENOENT:
            error = FailedPrecondition(
                f"{what}: {message}",
                hint="modprobe -a vduse virtio_vdpa vhost_vdpa; and run in the host's network namespace",
            )
        case errno.EAGAIN:
            error = Unavailable(f"{what}: the driver has not agreed on features yet")
        case errno.ETIMEDOUT:
            error = DeadlineExceeded(f"{what}: {message}")
        case errno.EINVAL | errno.ENODEV:
            error = FailedPrecondition(f"{what}: no VDUSE device of this name with all its queues set up")
        case _:
            error = VduseError(f"{what}: {message}")
    return error
