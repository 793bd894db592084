"""Block devices as backends: large blocks under small ones, devices that somebody has mounted, and real discards."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, leaves_nothing
from tests.vm.test_agent import attach_request, detach, refused

SIZE_BYTES = 64 * MIB


def _run(*argv: str) -> str:
    return subprocess.run(
        argv, check=True, capture_output=True, text=True, timeout=CALL_TIMEOUT_S
    ).stdout.strip()


@contextmanager
def _loop(image: Path, *, block_bytes: int) -> Iterator[Path]:
    os.truncate(image, SIZE_BYTES)
    _run("modprobe", "loop")
    device = Path(_run("losetup", "--find", "--show", f"--sector-size={block_bytes}", str(image)))
    try:
        yield device
    finally:
        _run("losetup", "--detach", str(device))


def _attach(agent: RunningAgent, device: Path, image: Path, **changes: object) -> str:
    request = attach_request(
        image, backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(device))), **changes
    )
    path: str = agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path
    return path


@pytest.mark.parametrize("volume_block", [512, 4096])
def test_blocks_of_4096_bytes_serve_volumes_of_either_kind(
    shared: RunningAgent, image: Path, volume_block: int
):
    with leaves_nothing(shared), _loop(image, block_bytes=4096) as device:
        path = _attach(shared, device, image, block_size_bytes=volume_block)
        unit = str(volume_block)
        _run("fio", "--name=a", f"--filename={path}", "--rw=randwrite", f"--bs={unit}", "--size=4M", "--direct=1",
             "--ioengine=libaio", "--iodepth=16", "--verify=crc32c", "--fsync=16")  # fmt: skip
        _run("blkdiscard", "--zeroout", "--offset", "1048576", "--length", str(volume_block * 3), path)
        _run("blkdiscard", "--offset", "2097152", "--length", str(volume_block), path)
        with Path(path).open("rb") as disk:
            disk.seek(1048576)
            assert disk.read(volume_block * 3) == bytes(volume_block * 3)
        detach(shared)


def test_a_device_that_is_mounted_is_not_served(shared: RunningAgent, image: Path, tmp_path: Path):
    place = tmp_path / "mnt"
    place.mkdir()
    with leaves_nothing(shared), _loop(image, block_bytes=512) as device:
        _run("mkfs.ext4", "-q", str(device))
        _run("mount", str(device), str(place))
        try:
            with refused(grpc.StatusCode.UNAVAILABLE, "is in use"):
                _attach(shared, device, image)
        finally:
            _run("umount", str(place))
        _attach(shared, device, image)
        assert subprocess.run(["mount", str(device), str(place)], check=False, timeout=60).returncode != 0
        detach(shared)


def test_what_is_discarded_is_free_below(shared: RunningAgent, image: Path):
    with leaves_nothing(shared), _loop(image, block_bytes=512) as device:
        path = _attach(shared, device, image)
        _run("dd", "if=/dev/urandom", f"of={path}", "bs=1M", "count=32", "oflag=direct", "conv=fsync")
        before = image.stat().st_blocks
        _run("blkdiscard", path)
        assert image.stat().st_blocks < before / 4
        detach(shared)
