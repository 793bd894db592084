"""What goes wrong on a node: each fault is told clearly, nothing is formatted over, nothing is left."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator

import pytest
from grpc import StatusCode

from csi_vduse.dataplane.device import DeviceSpec, create_device, destroy_device
from tests.vm.csi import MIB, READER, Driver, Volume, block, mount, refused
from tests.vm.exports import tool

WAIT_S = 120


@pytest.fixture
def volume(driver: Driver, request: pytest.FixtureRequest) -> Iterator[Volume]:
    made = driver.create(request.node.name[:60], 64)
    yield made
    driver.unstage(made)
    assert driver.leftovers() == []
    driver.delete(made)


@pytest.fixture
def formatted(driver: Driver, volume: Volume) -> Volume:
    """A volume with a file system and a file, not staged."""
    (driver.stage(volume, mount("ext4")) / "file").write_text("precious")
    driver.unstage(volume)
    return volume


def test_formatted_volume_with_a_wiped_superblock_is_not_formatted_again(
    driver: Driver, formatted: Volume
) -> None:
    with driver.image(formatted).open("r+b") as image:
        image.write(bytes(MIB))
    before = driver.image(formatted).read_bytes()
    with refused(StatusCode.DATA_LOSS, "was formatted as ext4"):
        driver.stage(formatted, mount("ext4"))
    assert driver.image(formatted).read_bytes() == before
    assert driver.leftovers() == []


def test_data_on_a_volume_never_formatted_is_not_formatted_over(driver: Driver, volume: Volume) -> None:
    driver.stage(volume, block())
    target = driver.publish(volume, "raw", block())
    with target.open("r+b") as device:
        device.seek(12345)
        device.write(b"precious")
    driver.unpublish(volume, "raw")
    driver.unstage(volume)
    with refused(StatusCode.FAILED_PRECONDITION, "never formatted, but holds data"):
        driver.stage(volume, mount("ext4"))
    assert driver.image(volume).read_bytes()[12345:12353] == b"precious"


def test_image_cut_short_is_an_error_and_not_a_blank_volume(driver: Driver, formatted: Volume) -> None:
    image = driver.image(formatted)
    content = image.read_bytes()
    os.truncate(image, MIB)
    with pytest.raises(Exception, match=r"image\.raw|bytes|short|smaller"):
        driver.stage(formatted, mount("ext4"))
    assert driver.leftovers() == []
    image.write_bytes(content)
    assert (driver.stage(formatted, mount("ext4")) / "file").read_text() == "precious"


def test_missing_pool_directory_is_told_and_leaves_nothing(driver: Driver, volume: Volume) -> None:
    pool = driver.directory / "pool"
    away = pool.rename(driver.directory / "away")
    try:
        with pytest.raises(Exception, match="pool"):
            driver.stage(volume, mount("ext4"))
        assert driver.leftovers() == []
    finally:
        away.rename(pool)
    driver.stage(volume, mount("ext4"))


def test_device_name_that_is_taken_is_told_and_the_other_device_kept(driver: Driver, volume: Volume) -> None:
    create_device(DeviceSpec(name=volume.id, capacity_bytes=MIB))
    try:
        with refused(StatusCode.ALREADY_EXISTS, volume.id):
            driver.stage(volume, mount("ext4"))
        assert driver.leftovers() == [f"/dev/vduse/{volume.id}"]
    finally:
        destroy_device(volume.id)
    driver.stage(volume, mount("ext4"))


def test_staging_path_that_is_a_file_is_refused_and_leaves_no_device(driver: Driver, volume: Volume) -> None:
    path = driver.staging(volume)
    path.write_text("mine")
    with refused(StatusCode.FAILED_PRECONDITION, "not a directory"):
        driver.stage(volume, mount("ext4"))
    assert path.read_text() == "mine"
    assert driver.leftovers() == []
    path.unlink()


def test_foreign_mount_at_the_staging_path_is_refused_and_kept(driver: Driver, volume: Volume) -> None:
    path = driver.staging(volume)
    path.mkdir()
    tool("mount", "-t", "tmpfs", "other", path)
    with refused(StatusCode.FAILED_PRECONDITION, "other (tmpfs"):
        driver.stage(volume, mount("ext4"))
    tool("umount", path)


def test_mount_option_that_the_file_system_refuses_leaves_nothing(driver: Driver, formatted: Volume) -> None:
    wanted = mount("ext4")
    wanted.mount.mount_flags.append("nosuchoption")
    with refused(StatusCode.FAILED_PRECONDITION, "cannot be mounted"):
        driver.stage(formatted, wanted)
    assert driver.leftovers() == []


def test_unstage_refuses_while_a_pod_has_the_volume(driver: Driver, volume: Volume) -> None:
    driver.stage(volume, mount("ext4"))
    target = driver.publish(volume, "pod", mount("ext4"))
    with refused(StatusCode.FAILED_PRECONDITION, str(target)):
        driver.unstage(volume)
    (target / "still").write_text("writable")
    driver.unpublish(volume, "pod")


def test_unstage_refuses_while_a_file_is_open(driver: Driver, volume: Volume) -> None:
    path = driver.stage(volume, mount("ext4"))
    with (path / "file").open("w"), refused(StatusCode.FAILED_PRECONDITION, "cannot unmount"):
        driver.unstage(volume)


def test_publish_after_the_device_is_gone_is_refused(driver: Driver, volume: Volume) -> None:
    driver.stage(volume, mount("ext4"))
    driver.unstage(volume)
    with refused(StatusCode.FAILED_PRECONDITION, "not staged"):
        driver.publish(volume, "pod", mount("ext4"))
    assert not (driver.directory / "pods/pod").exists()


def test_dead_worker_is_told_in_bounded_time_and_the_volume_can_be_given_back(
    driver: Driver, formatted: Volume
) -> None:
    # Read-only: nothing waits to be written, so that unmounting needs no worker.
    driver.stage(formatted, mount("ext4", READER))
    target = driver.publish(formatted, "pod", mount("ext4", READER))
    assert driver.health(formatted) == []
    image, away = driver.image(formatted), driver.image(formatted).with_suffix(".away")
    image.rename(away)  # or another worker would be there before anybody can look
    os.kill(worker_of(driver, formatted), signal.SIGKILL)
    deadline_s = time.monotonic() + WAIT_S
    while driver.health(formatted) == [] and time.monotonic() < deadline_s:
        time.sleep(0.2)
    assert driver.health(formatted) == ["WorkerDead"]
    assert b"worker of the volume is dead" in driver.stats(formatted, target).SerializeToString()
    with refused(StatusCode.UNAVAILABLE, "worker_dead"):
        driver.publish(formatted, "other", mount("ext4", READER))
    away.rename(image)
    while driver.health(formatted) and time.monotonic() < deadline_s + WAIT_S:
        time.sleep(0.2)
    assert driver.health(formatted) == []
    driver.unpublish(formatted, "pod")


def worker_of(driver: Driver, volume: Volume) -> int:
    record = driver.directory / "run/volumes" / volume.id / "record.json"
    return int(json.loads(record.read_text())["worker_pid"])


def test_image_cut_short_in_use_is_told_as_an_error_and_not_as_zeros(
    driver: Driver, formatted: Volume
) -> None:
    driver.stage(formatted, block())
    target = driver.publish(formatted, "raw", block())
    image = driver.image(formatted)
    os.truncate(image, 32 * MIB)
    tool("dd", f"if={target}", "of=/dev/null", "bs=1M", "skip=40", "count=1", "iflag=direct", fails=True)
    os.truncate(image, 64 * MIB)
    tool("dd", f"if={target}", "of=/dev/null", "bs=1M", "skip=40", "count=1", "iflag=direct")
    driver.unpublish(formatted, "raw")
