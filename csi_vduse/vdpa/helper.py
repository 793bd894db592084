"""The process that speaks netlink for us, because it can be killed: `python -m csi_vduse.vdpa.helper MARKER`.

One JSON request per line on standard input, one answer per line on standard output, in order; ends at end of
file. Requests: {"op": "add", "name": N, "driver": D}, {"op": "remove", "name": N}, {"op": "devices"},
{"op": "management_devices"}, {"op": "configuration", "name": N}. Answers: {"ok": true, "result": ...} or
{"ok": false, "errno": N, "message": TEXT}.

"add" leaves the device on the bus, bound to nothing, with its driver chosen; binding happens elsewhere, so
that the machine-wide vDPA lock is held for a moment only and never while a disk's partitions are read.
"""

from __future__ import annotations

import contextlib
import errno
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_vduse.errors import DeadlineExceeded
from csi_vduse.vdpa.autoprobe import Autoprobe
from csi_vduse.vdpa.netlink import Netlink
from csi_vduse.vdpa.sysfs import Sysfs

Request = dict[str, Any]


class _Service:
    def __init__(self, marker: Path) -> None:
        self._sysfs = Sysfs()
        self._autoprobe = Autoprobe(self._sysfs.bus_dir / "drivers_autoprobe", marker)
        self._netlink: Netlink | None = None

    def answer(self, request: Request) -> dict[str, Any]:
        """Carry out one request; never raises for what the kernel says."""
        operations: dict[str, Callable[[Request], Any]] = {
            "add": self._add,
            "remove": lambda r: self._open().remove(r["name"]),
            "devices": lambda _: self._open().devices(),
            "management_devices": lambda _: self._open().management_devices(),
            "configuration": lambda r: self._open().configuration(r["name"]),
        }
        try:
            return {"ok": True, "result": operations[request["op"]](request)}
        except OSError as error:
            return {"ok": False, "errno": error.errno or 0, "message": error.strerror or str(error)}
        except DeadlineExceeded as error:
            return {"ok": False, "errno": errno.ETIMEDOUT, "message": str(error)}

    def _open(self) -> Netlink:
        # Opened late and again after a failure: the module may be loaded after we were started.
        if self._netlink is None:
            self._netlink = Netlink()
        return self._netlink

    def _add(self, request: Request) -> None:
        netlink, name = self._open(), request["name"]
        with self._autoprobe.off():
            netlink.add(name)
            try:
                (self._sysfs.device_dir(name) / "driver_override").write_text(request["driver"])
            except OSError:
                netlink.remove(name)
                raise


def main() -> int:
    """Serve until end of file."""
    service = _Service(Path(sys.argv[1]))
    with contextlib.suppress(BrokenPipeError, KeyboardInterrupt):
        print(json.dumps({"ok": True, "result": "ready"}), flush=True)  # noqa: T201 - the protocol
        for line in sys.stdin:
            print(json.dumps(service.answer(json.loads(line))), flush=True)  # noqa: T201 - the protocol
    return 0


if __name__ == "__main__":
    sys.exit(main())
