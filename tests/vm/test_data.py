"""Content of a disk: what is zeroed, what is refused, and what a failing image looks like to its user."""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, leaves_nothing, wait_until

VOLUME = "vol-fedcba9876543210"


@contextlib.contextmanager
def attached(agent: RunningAgent, image: Path, *, read_only: bool = False) -> Iterator[Path]:
    """Attach the image while the body runs; gives the disk."""
    request = agent_pb2.AttachRequest(
        volume_id=VOLUME,
        backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image))),
        capacity_bytes=image.stat().st_size,
        read_only=read_only,
    )
    with leaves_nothing(agent):
        try:
            yield Path(agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path)
        finally:
            agent.stub.Detach(agent_pb2.DetachRequest(volume_id=VOLUME), timeout=CALL_TIMEOUT_S)


def random_image(path: Path, size_bytes: int) -> bytes:
    data = os.urandom(size_bytes)
    path.write_bytes(data)
    return data


def dd(*operands: str) -> int:
    return subprocess.run(
        ["dd", "bs=1M", *operands], check=False, timeout=120, capture_output=True
    ).returncode


def test_zeroed_and_discarded_ranges_read_back_as_zeros_and_others_as_before(
    shared: RunningAgent, image: Path
):
    expected = bytearray(random_image(image, 32 * MIB))
    with attached(shared, image) as disk:
        for option, offset, length in (("-z", 4, 8), (None, 20, 4)):
            argv = [
                "blkdiscard",
                *([option] if option else []),
                "-o",
                str(offset * MIB),
                "-l",
                str(length * MIB),
            ]
            subprocess.run([*argv, disk], check=True, timeout=120)
            expected[offset * MIB : (offset + length) * MIB] = bytes(length * MIB)
        assert disk.read_bytes() == bytes(expected)
    assert image.read_bytes() == bytes(expected)


def test_read_only_disk_refuses_writes_and_keeps_its_content(shared: RunningAgent, image: Path):
    before = random_image(image, 16 * MIB)
    with attached(shared, image, read_only=True) as disk:
        assert dd("if=/dev/zero", f"of={disk}", "count=1", "oflag=direct") != 0
        assert disk.read_bytes() == before
    assert image.read_bytes() == before


def test_image_cut_short_fails_reads_beyond_its_end_only_and_is_logged(shared: RunningAgent, image: Path):
    random_image(image, 32 * MIB)
    with attached(shared, image) as disk:
        os.truncate(image, 16 * MIB)
        assert dd(f"if={disk}", "of=/dev/null", "skip=20", "count=1", "iflag=direct") != 0
        assert dd(f"if={disk}", "of=/dev/null", "count=4", "iflag=direct") == 0
        wait_until(lambda: "EIO" in shared.log.read_text(), "the log line")


def test_full_pool_fails_writes_with_an_error_that_is_logged(shared: RunningAgent, tmp_path: Path):
    pool = tmp_path / "pool"
    pool.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", pool], check=True, timeout=60)
    try:
        image = pool / "image"
        image.touch()
        os.truncate(image, 32 * MIB)
        with attached(shared, image) as disk:
            assert dd("if=/dev/urandom", f"of={disk}", "count=16", "oflag=direct") != 0
            wait_until(lambda: "ENOSPC" in shared.log.read_text(), "the log line")
    finally:
        subprocess.run(["umount", pool], check=True, timeout=60)
