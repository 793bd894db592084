"""A mediator: the engine's own rings, and the servers that work on them, one after the other."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest

from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.dataplane.vhost_user import frontend
from csi_vduse.dataplane.vhost_user.mediator import Mediator
from tests.unit.vhost_user.test_vhost_user_relay import IMAGE_BYTES, TIMEOUT_S, Driver, serving, until
from tests.vhost_user.frontend import SIZE


class MediatedDriver(Driver):
    """The same driver, with a mediator in the relay's place."""

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
            dial=lambda: frontend.connect(self.socket_path),
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
            server.send_signal(signal.SIGSTOP)
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
