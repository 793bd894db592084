"""`csi-vduse export --vhost-user`: a disk behind a vhost-user socket, in the foreground.

The first line printed is the path of the socket, when it can be connected to. SIGTERM or SIGINT removes it. SIGHUP
shows the front-end the size that the file has grown to.
"""

from __future__ import annotations

import argparse
import os
from contextlib import ExitStack
from dataclasses import replace

from csi_vduse.agent.agent import default_queues
from csi_vduse.cli.options import parse_backend, throttle_of, usable_bytes
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.config_space import SECTOR_BYTES
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.server import Server
from csi_vduse.errors import InvalidArgument

# QEMU's default for vhost-user-blk-pci. A driver may send requests as large as seg_max, which follows from this,
# says, and QEMU hands that on to a guest whatever its own queue-size is: so the smaller number is the safe one.
_DEFAULT_QUEUE_SIZE = 128


def run(options: argparse.Namespace) -> int:
    """Serve until SIGTERM."""
    backend, size_bytes = parse_backend(options.backend)
    if isinstance(backend, VhostUserBackend):
        raise InvalidArgument(
            "a vhost-user server needs no other in front of it", hint="let QEMU connect to it"
        )
    spec = DeviceSpec(
        name=options.name,
        capacity_bytes=options.block_size or SECTOR_BYTES,  # until the backend is open
        block_size_bytes=options.block_size or SECTOR_BYTES,
        queues=options.queues or default_queues(),
        queue_size=options.queue_size or _DEFAULT_QUEUE_SIZE,
        read_only=options.read_only,
    )
    with ExitStack() as undo:
        event_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        undo.callback(os.close, event_fd)
        engine = Engine(
            backend=backend,
            capacity_bytes=0,  # a server says it on the connection that is then used: it may allow one only
            block_size_bytes=spec.block_size_bytes,
            max_queues=spec.queues,
            read_only=spec.read_only,
            serial=spec.name,
            event_fd=event_fd,
        )
        undo.callback(engine.close)
        capacity_bytes = usable_bytes(
            engine.backend_capacity_bytes or size_bytes,
            spec.block_size_bytes,
            said_bytes=engine.backend_said_bytes or size_bytes,
        )
        engine.set_capacity(capacity_bytes)
        spec = replace(spec, capacity_bytes=capacity_bytes)
        engine.set_throttle(throttle_of(options))
        server = Server(options.vhost_user, engine, spec, event_fd)
        server.run(lambda: print(options.vhost_user, flush=True))
    return 0
