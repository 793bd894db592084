"""A server whose backend takes one request a second, so that a test knows what is in flight when it kills it.

python -m tests.vhost_user.held_server SOCKET IMAGE
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from csi_vduse.dataplane._engine import ffi, lib
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.server import Server


def main(socket: Path, image: Path) -> None:
    spec = DeviceSpec("held", image.stat().st_size, queues=1, queue_size=128)
    event_fd = os.eventfd(0, os.EFD_NONBLOCK)
    engine = Engine(
        backend=FileBackend(image),
        capacity_bytes=spec.capacity_bytes,
        block_size_bytes=512,
        max_queues=1,
        read_only=False,
        serial="held",
        event_fd=event_fd,
    )
    limits = {"requests_per_s": 1, "bytes_per_s": 0, "burst_ms": 0}
    lib.vd_engine_set_limits(engine._engine, ffi.new("struct vd_limits *", limits))

    def ready() -> None:
        os.write(1, f"{socket}\n".encode())

    Server(socket, engine, spec, event_fd).run(ready)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
