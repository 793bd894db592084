"""A relay and the servers that it hands a driver's ring to, one after the other."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from csi_vduse.dataplane import config_space, inflight
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import QueueAddress, Region
from csi_vduse.dataplane.inflight import LogIdentity
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.dataplane.vhost_user.relay import Relay
from csi_vduse.dataplane.vhost_user.relayed import ServerLog
from csi_vduse.errors import FailedPrecondition, NotFound, Unavailable
from tests.vhost_user.frontend import AVAIL, DESC, GUEST, MEMORY_BYTES, SIZE, USED, Frontend

IMAGE_BYTES = 1 << 20
FEATURES = config_space.F_VERSION_1 | config_space.F_ACCESS_PLATFORM
TIMEOUT_S = 30


def until(met: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not met():
        assert time.monotonic() < deadline
        time.sleep(0.01)


class Driver:
    """A driver with one ring of one sector's requests, and the relay of its device."""

    def __init__(self, folder: Path, socket_path: Path) -> None:
        ours, self._unused = socket.socketpair()
        self.guest = Frontend(ours)
        self.log_path = folder / "log"
        self.identity = LogIdentity("boot", 1, queues=1, queue_size=SIZE, server=True)
        inflight.create(self.log_path, self.identity)
        self.event_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.socket_path = socket_path
        self.relay = self._relay()

    def _relay(self) -> Relay:
        with self.log_path.open("r+b") as file:
            return Relay(
                VhostUserBackend(self.socket_path),
                DeviceSpec("disk", IMAGE_BYTES, queue_size=SIZE),
                server_log=ServerLog(file.fileno(), self.identity.place),
                dial=lambda: frontend.dial(self.socket_path),
                event_fd=self.event_fd,
            )

    def start(self, *, paused: bool = False) -> None:
        memory = Region(GUEST, MEMORY_BYTES, 0, self.guest.memory_fd, writable=True)
        self.relay.set_regions([memory])
        self.relay.start_queue(
            0,
            QueueAddress(
                features=FEATURES,
                size=SIZE,
                desc_iova=GUEST + DESC,
                driver_iova=GUEST + AVAIL,
                device_iova=GUEST + USED,
                state=0,
                resume=False,
                kick_fd=self.guest.kick,
                notify_fd=self.guest.call,
                notify_ioctl=0,
                paused=paused,
            ),
        )

    def followed_by_another_worker(self) -> None:
        self.relay.close()
        self.relay = self._relay()
        self.start()

    def reads(self) -> None:
        used = self.guest.used()
        self.guest.submit()
        self.hears_of(used + 1)

    def hears_of(self, used: int) -> None:
        while self.guest.used() != used:
            assert self.guest.signalled(self.guest.call), self.relay.backend_status()
        assert self.guest.sector()[0] == 0

    def close(self) -> None:
        self.relay.close()
        self.guest.close()
        self._unused.close()
        os.close(self.event_fd)


@contextmanager
def serving(socket_path: Path, image: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    program = str(Path(sys.executable).parent / "csi-vduse")
    argv = [
        program,
        "export",
        "--vhost-user",
        str(socket_path),
        "--backend",
        f"file:{image}",
        *options,
        "disk",
    ]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(os.urandom(IMAGE_BYTES))
    return path


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Driver]:
    made = Driver(tmp_path, tmp_path / "sock")
    yield made
    made.close()


def test_a_server_works_on_the_drivers_ring(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image):
        driver.start()
        for _ in range(3 * SIZE):
            driver.reads()
            assert driver.guest.sector()[1] == image.read_bytes()[:512]
        assert driver.relay.stop_queue(0, TIMEOUT_S)
        assert driver.relay.queue_state(0) == 0


def test_requests_wait_for_a_server_that_comes_later(driver: Driver, image: Path) -> None:
    driver.start()
    driver.guest.submit()
    until(lambda: driver.relay.backend_status().state == "connecting")
    assert driver.guest.used() == 0
    with serving(driver.socket_path, image):
        driver.hears_of(1)
    assert driver.guest.sector()[1] == image.read_bytes()[:512]


def test_a_killed_server_is_followed_by_the_next_one(driver: Driver, image: Path) -> None:
    driver.start()
    for _ in range(3):
        with serving(driver.socket_path, image) as server:
            driver.reads()
            server.send_signal(signal.SIGKILL)
            server.wait(TIMEOUT_S)
            used = driver.guest.used()
            driver.guest.submit()
        with serving(driver.socket_path, image):
            driver.hears_of(used + 1)
    until(lambda: driver.relay.stats()["remote"]["losses"] == 6)


def test_another_worker_goes_on_where_the_ring_is(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image):
        driver.start()
        for _ in range(3):
            driver.reads()
            driver.followed_by_another_worker()
        driver.reads()


def test_a_paused_queue_is_not_served_and_goes_on(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image):
        driver.start()
        driver.reads()
        assert driver.relay.pause_queue(0, TIMEOUT_S)
        assert driver.relay.queue_state(0) == 1
        while driver.guest.signalled(driver.guest.call, 0):
            pass
        driver.guest.submit()
        assert not driver.guest.signalled(driver.guest.call, 0.2)
        driver.relay.resume_queue(0)
        driver.hears_of(2)


def test_a_server_that_is_away_cannot_be_paused(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image):
        driver.start()
        driver.reads()
    until(lambda: driver.relay.backend_status().state == "connecting")
    assert not driver.relay.pause_queue(0, TIMEOUT_S)


def test_the_server_says_how_far_a_disk_can_grow(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image) as server:
        driver.start()
        driver.reads()
        with pytest.raises(
            FailedPrecondition, match=f"{2 * IMAGE_BYTES} is more than the {IMAGE_BYTES} bytes"
        ):
            driver.relay.set_capacity(2 * IMAGE_BYTES)
        os.truncate(image, 2 * IMAGE_BYTES)
        server.send_signal(signal.SIGHUP)

        def grown() -> bool:
            with suppress(FailedPrecondition):
                driver.relay.set_capacity(2 * IMAGE_BYTES)
                return True
            return False

        until(grown)
        driver.reads()


def test_a_server_that_comes_back_with_less_is_refused_until_it_has_enough(
    driver: Driver, image: Path
) -> None:
    with serving(driver.socket_path, image):
        driver.start()
        driver.reads()
    os.truncate(image, IMAGE_BYTES // 2)
    driver.guest.submit()
    with serving(driver.socket_path, image):
        until(lambda: driver.relay.backend_status().state == "refused")
        assert f"has {IMAGE_BYTES // 2} bytes" in driver.relay.backend_status().reason
        assert driver.guest.used() == 1
    os.truncate(image, IMAGE_BYTES)
    with serving(driver.socket_path, image):
        driver.hears_of(2)


def test_a_stopped_server_costs_the_device_and_not_the_drivers_memory(driver: Driver, image: Path) -> None:
    with serving(driver.socket_path, image) as server:
        driver.start()
        driver.reads()
        server.send_signal(signal.SIGSTOP)
        assert not driver.relay.stop_queue(0, 0.1)


def test_limits_are_refused(driver: Driver) -> None:
    with pytest.raises(FailedPrecondition, match="cannot be limited here"):
        driver.relay.set_throttle(Throttle(iops=1))


def test_a_server_that_keeps_no_log_is_refused(tmp_path: Path, image: Path) -> None:
    path = tmp_path / "qsd"
    node = f"driver=file,node-name=f,filename={image},locking=off"
    export = f"type=vhost-user-blk,id=e,node-name=f,addr.type=unix,addr.path={path},writable=on"
    with subprocess.Popen(["qemu-storage-daemon", "--blockdev", node, "--export", export]) as process:
        try:
            until(path.exists)
            offer = frontend.probe(path)
        finally:
            process.kill()
    assert offer.capacity_bytes == IMAGE_BYTES
    with pytest.raises(FailedPrecondition, match="keeps no log"):
        offer.check(read_only=False, without_flush=False, keeps_log=True)


def test_where_nobody_listens_nothing_is_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="sock"):
        frontend.probe(tmp_path / "sock")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "sock"))
    with pytest.raises(Unavailable, match="Connection refused"):
        frontend.probe(tmp_path / "sock")
