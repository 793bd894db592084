"""fio with checksums on volumes as workloads have them: published through CSI."""

from __future__ import annotations

import pytest

from tests.vm.conftest import PARALLEL
from tests.vm.csi import READER, Driver, block, mount
from tests.vm.exports import fio, tool

JOBS = ("--rw=randwrite", "--bsrange=4k-128k", "--numjobs=4", "--size=12m")


@pytest.mark.parametrize("engine", [pytest.param("libaio", marks=PARALLEL), "io_uring"])
def test_raw_volume_reads_back_what_four_jobs_wrote(driver: Driver, engine: str) -> None:
    volume = driver.create(f"raw-{engine}", 64, queues="2")
    driver.stage(volume, block())
    fio(driver.publish(volume, "raw", block()), engine, *JOBS, "--offset_increment=16m")
    driver.unpublish(volume, "raw")
    driver.unstage(volume)
    driver.delete(volume)


@pytest.mark.parametrize("engine", ["libaio", "io_uring"])
def test_ext4_volume_reads_back_what_four_jobs_wrote(driver: Driver, engine: str) -> None:
    volume = driver.create(f"ext4-{engine}", 128)
    driver.stage(volume, mount("ext4"))
    fio(driver.publish(volume, "pod", mount("ext4")), engine, *JOBS, "--fsync=64")
    driver.unpublish(volume, "pod")
    driver.unstage(volume)
    tool("e2fsck", "-fn", driver.image(volume))
    driver.delete(volume)


def test_writes_to_a_read_only_raw_volume_fail_cleanly(driver: Driver) -> None:
    volume = driver.create("reader", 16)
    driver.stage(volume, block(READER))
    target = driver.publish(volume, "raw", block(READER))
    said = tool(
        "fio",
        "--name=write",
        f"--filename={target}",
        "--rw=write",
        "--bs=4k",
        "--size=64k",
        "--direct=1",
        "--allow_file_create=0",
        fails=True,
    )
    assert "Read-only" in said or "Permission denied" in said or "Operation not permitted" in said, said
    assert not any(driver.image(volume).read_bytes())
    assert target.read_bytes() == bytes(16 << 20)
    driver.unpublish(volume, "raw")
    driver.unstage(volume)
    driver.delete(volume)


def test_zeroed_raw_volume_reads_back_zeros(driver: Driver) -> None:
    volume = driver.create("zeroed", 16)
    driver.stage(volume, block())
    target = driver.publish(volume, "raw", block())
    target.write_bytes(b"\xa5" * (16 << 20))
    tool("blkdiscard", "-z", target)
    assert not any(target.read_bytes())
    driver.unpublish(volume, "raw")
    driver.unstage(volume)
    assert not any(driver.image(volume).read_bytes())
    driver.delete(volume)
