"""A session over an engine, served by a thread; whatever a test does to it, no descriptor is left."""

from __future__ import annotations

import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user.connection import Connection
from csi_vduse.dataplane.vhost_user.session import Session
from csi_vduse.errors import ProtocolError, Unavailable
from tests.vhost_user.frontend import Frontend

SPEC = DeviceSpec("disk", 64 << 20, queues=2, queue_size=128)
SLOTS = 12


def open_files() -> int:
    """How many there are, but for the one that the engine's first use leaves for the process's life (memory.c)."""
    descriptors = (entry for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink())
    return sum(1 for entry in descriptors if "memfd:isolated" not in str(entry.readlink()))


class Running:
    """A session served by a thread, as the server's loop would."""

    def __init__(self, engine: Engine) -> None:
        ours, theirs = socket.socketpair()
        self.frontend = Frontend(theirs)
        self.session = Session(Connection(ours), engine, SPEC, memory_slots=SLOTS)
        self.ended: Exception | None = None
        self._sock = ours
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        try:
            while True:
                select.select([self._sock], [], [])
                self.session.handle_input()
        except (ProtocolError, Unavailable) as error:
            self.ended = error
        finally:
            self.session.close()

    def join(self) -> Exception | None:
        self._thread.join(30)
        assert not self._thread.is_alive()
        return self.ended


@contextmanager
def serving(backend: BackendSpec, make: Callable[..., Engine] = Engine) -> Iterator[Running]:
    """A session over an engine; whatever happens in it, no descriptor is left."""
    before = open_files()
    event_fd = os.eventfd(0)
    engine = make(
        backend=backend,
        capacity_bytes=SPEC.capacity_bytes,
        block_size_bytes=512,
        max_queues=SPEC.queues,
        read_only=False,
        serial="disk",
        event_fd=event_fd,
    )
    running = Running(engine)
    try:
        yield running
    finally:
        running.frontend.close()
        running.join()
        engine.close()
        os.close(event_fd)
    assert open_files() == before


def reads_a_sector(frontend: Frontend) -> bool:
    while frontend.signalled(frontend.call, 0):
        pass
    used = frontend.used()
    frontend.submit()
    while frontend.used() == used:
        if not frontend.signalled(frontend.call):
            return False
    return frontend.used() == used + 1 and frontend.sector() == (0, bytes(512))
