"""A mediator: the engine's own rings, and the servers that work on them, one after the other."""

from __future__ import annotations

import mmap
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.dataplane.vhost_user.mediator import Mediator
from csi_vduse.dataplane.vhost_user.protocol import BackendRequest, Request
from tests.unit.vhost_user.test_vhost_user_frontend import honest, reply
from tests.unit.vhost_user.test_vhost_user_relay import IMAGE_BYTES, TIMEOUT_S, Driver, serving, until
from tests.vhost_user.frontend import SIZE

Dial = Callable[[], tuple[socket.socket, frontend.Pair]]


class MediatedDriver(Driver):
    """The same driver, with a mediator in the relay's place."""

    def __init__(self, folder: Path, socket_path: Path, dial: Dial | None = None) -> None:
        self._dial = dial or (lambda: frontend.dial(socket_path))
        super().__init__(folder, socket_path)

    def _relay(self) -> Mediator:  # type: ignore[override]
        backend = VhostUserBackend(self.socket_path, mediated=True)
        engine = Engine(
            backend=backend,
            capacity_bytes=IMAGE_BYTES,
            block_size_bytes=512,
            max_queues=1,
            queue_size=SIZE,
            read_only=False,
            serial="disk",
            event_fd=self.event_fd,
        )
        return Mediator(
            engine,
            backend,
            DeviceSpec("disk", IMAGE_BYTES, queue_size=SIZE),
            dial=self._dial,
            event_fd=self.event_fd,
        )


@contextmanager
def qsd(socket_path: Path, image: Path) -> Iterator[subprocess.Popen[bytes]]:
    node = f"driver=file,node-name=f,filename={image},locking=off"
    export = f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={socket_path},writable=on"
    socket_path.unlink(missing_ok=True)
    with subprocess.Popen(["qemu-storage-daemon", "--blockdev", node, "--export", export]) as process:
        try:
            until(socket_path.exists)
            yield process
        finally:
            process.kill()


def stop(server: subprocess.Popen[str] | subprocess.Popen[bytes]) -> None:
    """Returns when no thread of it runs any more."""
    server.send_signal(signal.SIGSTOP)
    tasks = Path(f"/proc/{server.pid}/task")
    until(lambda: all(") T " in (task / "stat").read_text() for task in tasks.iterdir()))


Serve = Callable[[Path, Path], AbstractContextManager[subprocess.Popen[str] | subprocess.Popen[bytes]]]


@pytest.fixture(params=[serving, qsd], ids=["ours", "qemu-storage-daemon"])
def serve(request: pytest.FixtureRequest) -> Serve:
    chosen: Serve = request.param
    return chosen


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(IMAGE_BYTES))
    return path


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[MediatedDriver]:
    made = MediatedDriver(tmp_path, tmp_path / "sock")
    yield made
    made.relay.stop_queue(0, TIMEOUT_S)
    made.close()


def test_requests_go_on_to_a_server(driver: MediatedDriver, image: Path, serve: Serve) -> None:
    with serve(driver.socket_path, image):
        driver.start()
        for _ in range(3 * SIZE):
            driver.reads()
            assert driver.guest.sector()[1] == image.read_bytes()[:512]
        assert driver.relay.stats()["operations"][0]["count"] == 3 * SIZE


def test_a_killed_server_is_followed_by_the_next_one(
    driver: MediatedDriver, image: Path, serve: Serve
) -> None:
    driver.start()
    for _ in range(3):
        with serve(driver.socket_path, image) as server:
            driver.reads()
            used = driver.guest.used()
            stop(server)
            driver.guest.submit()
            until(lambda: driver.relay.stats()["in_flight"] == 1)
            server.send_signal(signal.SIGKILL)
            server.wait(TIMEOUT_S)
        assert driver.guest.used() == used
        with serve(driver.socket_path, image):
            driver.hears_of(used + 1)


def test_a_paused_queue_is_not_served_and_goes_on(driver: MediatedDriver, image: Path, serve: Serve) -> None:
    with serve(driver.socket_path, image):
        driver.start()
        driver.reads()
        assert driver.relay.pause_queue(0, TIMEOUT_S)
        while driver.guest.signalled(driver.guest.call, 0):
            pass
        driver.guest.submit()
        assert not driver.guest.signalled(driver.guest.call, 0.2)
        driver.relay.resume_queue(0)
        driver.hears_of(2)


def test_limits_are_kept(driver: MediatedDriver, image: Path) -> None:
    with serving(driver.socket_path, image):
        driver.relay.set_throttle(Throttle(iops=1000))
        driver.start()
        driver.reads()


@contextmanager
def puppet() -> Iterator[Dial]:
    """A server that says yes to everything and works on no ring."""
    ends: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def serve(end: socket.socket) -> None:
        with end, suppress(OSError):
            while header := end.recv(12, socket.MSG_WAITALL):
                request, _, size = struct.unpack("=III", header)
                payload = end.recv(size, socket.MSG_WAITALL) if size else b""
                end.sendall(obedient(request, payload))

    def dial() -> tuple[socket.socket, frontend.Pair]:
        ours, theirs = socket.socketpair()
        ends.append(theirs)
        threads.append(threading.Thread(target=serve, args=(theirs,)))
        threads[-1].start()
        return ours, socket.socketpair()

    yield dial
    for thread in threads:
        thread.join(TIMEOUT_S)


def obedient(request: int, payload: bytes) -> bytes:
    if request == Request.GET_CONFIG:
        return reply(request, payload[:12] + DeviceSpec("disk", IMAGE_BYTES).config())
    return honest(request, payload)


@pytest.mark.parametrize(
    "used",
    [
        lambda index, _: (index + 1, struct.pack("<II", 7, 0)),
        lambda index, _: (index + 1, struct.pack("<II", 1 << 31, 0)),
        lambda index, _: (index + 2, struct.pack("<IIII", 0, 0, 0, 0)),
        lambda index, _: (index + 5000, b""),
    ],
    ids=["another request", "no request", "one twice", "more than there are"],
)
def test_a_server_that_answers_what_it_was_not_asked_is_left(
    tmp_path: Path, used: Callable[[int, int], tuple[int, bytes]]
) -> None:
    with puppet() as dial:
        driver = MediatedDriver(tmp_path, tmp_path / "sock", dial)
        driver.start()
        driver.guest.submit()
        engine = driver.relay._engine  # type: ignore[attr-defined]
        address, call_fd = engine.server_ring(0)
        region = engine.server_region()
        with mmap.mmap(region.fd, region.size_bytes) as memory:
            at, avail = address.device_iova - region.iova, address.driver_iova - region.iova
            until(lambda: memory[avail + 2 : avail + 4] == struct.pack("<H", 1))
            index, entries = used(0, 0)
            memory[at + 4 : at + 4 + len(entries)] = entries
            memory[at + 2 : at + 4] = struct.pack("<H", index & 0xFFFF)
            os.eventfd_write(call_fd, 1)
            until(lambda: _told(driver))
            until(lambda: driver.relay.backend_status().connects > 1)
        # What it had is with the next one, and the driver heard of nothing that was not.
        assert driver.guest.used() <= 1
        driver.relay.stop_queue(0, 0.1)
        driver.close()


@pytest.mark.parametrize(
    "said",
    [
        struct.pack("=III", Request.SET_MEM_TABLE, 1, 0),
        struct.pack("=III", BackendRequest.CONFIG_CHANGE, 5, 0),
        struct.pack("=III", BackendRequest.CONFIG_CHANGE, 1, 1 << 20),
    ],
    ids=["something else", "an answer", "too much"],
)
def test_a_server_that_tells_of_what_it_must_not_is_left(tmp_path: Path, said: bytes) -> None:
    """On the channel for changes: an honest one changes nothing, and is not left."""
    ends: list[socket.socket] = []
    with puppet() as dial:

        def dial_and_keep() -> tuple[socket.socket, frontend.Pair]:
            sock, changes = dial()
            ends.append(changes[1].dup())
            return sock, changes

        driver = MediatedDriver(tmp_path, tmp_path / "sock", dial_and_keep)
        driver.start()
        until(lambda: driver.relay.backend_status().connects == 1)
        ends[0].sendall(struct.pack("=III", BackendRequest.CONFIG_CHANGE, 1 | 1 << 3, 0))
        assert ends[0].recv(20) == struct.pack("=IIIQ", BackendRequest.CONFIG_CHANGE, 5, 8, 0)
        assert not _told(driver)
        ends[0].sendall(said)
        until(lambda: _told(driver))
        until(lambda: driver.relay.backend_status().connects > 1)
        driver.relay.stop_queue(0, 0.1)
        driver.close()
        for end in ends:
            end.close()


def _told(driver: MediatedDriver) -> bool:
    """Do as the worker does when the engine has it look."""
    driver.relay.backend_status()
    return int(driver.relay.stats()["remote"]["losses"]) > 0
