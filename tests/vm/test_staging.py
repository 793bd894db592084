"""Staging and its end on VDUSE disks: as fast as without limits, and never under somebody who still has the disk."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import threading
import time
from pathlib import Path

import grpc
import pytest
from grpc import StatusCode

from tests.unit.namespaces import elsewhere
from tests.vm.csi import MIB, Driver, Volume, block, driver, mount, refused
from tests.vm.exports import tool
from tests.vm.nbd_servers import nbdkit, serving

__all__ = ["driver"]


def disk_of(node: Path) -> str:
    """Name of the disk that a device node is of."""
    number = node.stat().st_rdev
    return Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}").resolve().name


def test_a_volume_with_the_lowest_limits_is_staged_like_any_other(driver: Driver) -> None:
    """Its probe alone reads 10 MiB: more than two minutes with its bandwidth, and hours with its requests."""
    volume = driver.create("slow", 64, maxIops="1", maxBandwidth="64Ki")
    path = driver.stage(volume, mount("ext4"))
    disk = re.search(rf"^(\S+) {path} ", Path("/proc/mounts").read_text(), re.MULTILINE)
    assert disk is not None
    begun = time.monotonic()
    tool(
        "dd",
        f"if={disk[1]}",
        "of=/dev/null",
        "bs=4096",
        "count=4",
        "skip=5000",
        "iflag=direct",
        "status=none",
    )
    assert time.monotonic() - begun > 2, "the limits are not in force when it is staged"
    (path / "file").write_bytes(
        os.urandom(2 << 20)
    )  # half a minute with its bandwidth, if not written back freely
    driver.unstage(volume)
    driver.delete(volume)


def kill_mkfs(killed: threading.Event, over: threading.Event) -> None:
    """Kill the next mkfs that runs, a moment after its start: it is among the youngest processes."""
    while not over.is_set() and not killed.is_set():
        youngest = int(Path("/proc/loadavg").read_text().split()[-1])
        for pid in range(max(2, youngest - 8), youngest + 1):
            with contextlib.suppress(OSError):
                if Path(f"/proc/{pid}/comm").read_text().startswith("mkfs."):
                    os.kill(pid, signal.SIGKILL)
                    killed.set()


@pytest.mark.parametrize(("fs", "size_mib"), [("ext4", 64), ("xfs", 320), ("btrfs", 256)])
def test_an_interrupted_mkfs_is_begun_again(driver: Driver, fs: str, size_mib: int) -> None:
    volume = driver.create(f"interrupted-{fs}", size_mib)
    killed, over = threading.Event(), threading.Event()
    killer = threading.Thread(target=kill_mkfs, args=(killed, over))
    killer.start()
    with contextlib.suppress(grpc.RpcError):  # one that was killed too late has made the file system
        driver.stage(volume, mount(fs))
    over.set()
    killer.join()
    assert killed.is_set()
    if driver.record(volume)["filesystem"]["state"] == "formatting":
        assert driver.record(volume)["filesystem"]["uuid"]
    path = driver.stage(volume, mount(fs))
    (path / "file").write_text("x")
    assert driver.record(volume)["filesystem"] == {"type": fs, "state": "formatted"}
    driver.unstage(volume)
    driver.delete(volume)


def test_a_disk_that_others_have_stays_and_they_are_named(driver: Driver) -> None:
    volume = driver.create("shared", 64)
    path = driver.stage(volume, mount("ext4"))
    (path / "f").write_text("x")
    with elsewhere() as process:
        with refused(StatusCode.FAILED_PRECONDITION, f"in the mount namespace of {process.pid} ("):
            driver.unstage(volume)
        driver.stage(volume, mount("ext4"))
        assert (path / "f").read_text() == "x"
    driver.unstage(volume)
    driver.stage(volume, block())
    target = driver.publish(volume, "raw", block())
    disk = disk_of(target)
    tool("modprobe", "loop")
    loop = subprocess.run(
        ["losetup", "--find", "--show", target], check=True, capture_output=True, text=True
    ).stdout.strip()
    with refused(StatusCode.FAILED_PRECONDITION, Path(loop).name):
        driver.unpublish(volume, "raw")
    tool("losetup", "--detach", loop)
    driver.unpublish(volume, "raw")
    tool("losetup", loop, f"/dev/{disk}")
    with refused(StatusCode.FAILED_PRECONDITION, f"used by {Path(loop).name}"):
        driver.unstage(volume)
    assert Path(f"/sys/block/{disk}").exists()
    tool("losetup", "--detach", loop)
    driver.unstage(volume)
    driver.delete(volume)


def test_an_export_that_grows_at_its_server_can_be_written_to_its_new_end(
    driver: Driver, tmp_path: Path
) -> None:
    """A server says the size once for each connection, and may refuse what lies beyond it on an old one."""
    image = tmp_path / "image"
    image.touch()
    os.truncate(image, 64 * MIB)
    volume = Volume("an export with a long name that says nothing of its queues", "export")
    with serving(nbdkit(image)) as server:
        driver.stage(volume, block(), attributes={"uri": server.uri})
        disk = driver.publish(volume, "export", block())
        os.truncate(image, 128 * MIB)
        assert driver.expand_on_node(volume, driver.staging(volume), 128) == 128 * MIB
        data = tmp_path / "data"
        data.write_bytes(os.urandom(8 * MIB))
        tool("dd", f"if={data}", f"of={disk}", "bs=1M", "seek=110", "oflag=direct", "status=none")
        assert image.read_bytes()[110 * MIB : 118 * MIB] == data.read_bytes()
        driver.unpublish(volume, "export")
        driver.unstage(volume)
