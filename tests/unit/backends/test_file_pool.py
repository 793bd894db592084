"""File pools: whole images or none, copies that equal their source, faults told clearly."""

import asyncio
import errno
import json
import os
import shutil
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from csi_vduse.backends import copying, file
from csi_vduse.backends.base import Copying
from csi_vduse.backends.pools import open_pools
from csi_vduse.config import parse_pool
from csi_vduse.errors import (
    DataLoss,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    OutOfRange,
    PermissionDenied,
    ResourceExhausted,
    Unavailable,
)
from csi_vduse.files import remove_tree
from tests.unit.backends.builders import MIB, a_pool, a_snapshot, a_volume, files_below, image_of, soon
from tests.unit.node.loop_agent import loop_works


@pytest.fixture
def pool(tmp_path):
    pool = a_pool(tmp_path)
    yield pool
    pool.close()


@pytest.fixture
def refuse(monkeypatch):
    """Makes a system call fail: refuse("fsync", errno.EIO)."""

    def patch(name, number):
        def fails(*_args, **_kwargs):
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr(os, name, fails)

    return patch


async def filled(pool, tmp_path, volume, pattern=b"data", at=MIB):
    await pool.create(volume)
    with image_of(tmp_path, volume).open("r+b") as image:
        image.seek(at)
        image.write(pattern)
    return volume


async def test_create_makes_a_sparse_image_of_the_capacity(pool, tmp_path):
    await pool.create(a_volume())
    stat = image_of(tmp_path, a_volume()).stat()
    assert stat.st_size == 4 * MIB
    assert stat.st_blocks == 0
    assert stat.st_mode & 0o777 == 0o600


async def test_create_again_keeps_the_image(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    await pool.create(volume)
    assert image_of(tmp_path, volume).read_bytes()[MIB : MIB + 4] == b"data"


async def test_the_directory_of_a_volume_says_what_it_is(pool, tmp_path):
    await pool.create(a_volume("my-claim"))
    meta = json.loads((image_of(tmp_path, a_volume("my-claim")).parent / "meta.json").read_text())
    assert meta["name"] == "my-claim"


@pytest.mark.parametrize("reflink", [True, False])
async def test_copies_equal_their_source(pool, tmp_path, monkeypatch, reflink):
    if not reflink:
        monkeypatch.setattr(copying, "_reflink", lambda *_: False)
    source = await filled(pool, tmp_path, a_volume())
    await pool.snapshot(source, a_snapshot(), copying=soon())
    await pool.clone(source, a_volume("clone"), copying=soon())
    await pool.restore(a_snapshot(), a_volume("restored"), copying=soon())
    content = image_of(tmp_path, source).read_bytes()
    for copy in (a_snapshot(), a_volume("clone"), a_volume("restored")):
        assert image_of(tmp_path, copy).read_bytes() == content


async def test_copies_stay_sparse(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume(capacity_bytes=1 << 40))
    await pool.snapshot(source, a_snapshot(size_bytes=1 << 40), copying=soon())
    stat = image_of(tmp_path, a_snapshot()).stat()
    assert stat.st_size == 1 << 40
    assert stat.st_blocks * 512 < MIB


async def test_copying_works_without_copy_file_range(pool, tmp_path, refuse):
    source = await filled(pool, tmp_path, a_volume(), pattern=os.urandom(2 * MIB))
    refuse("copy_file_range", errno.EXDEV)
    await pool.clone(source, a_volume("clone"), copying=soon())
    assert image_of(tmp_path, a_volume("clone")).read_bytes() == image_of(tmp_path, source).read_bytes()


async def test_a_larger_clone_has_zeros_at_its_end(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume())
    large = a_volume("large", capacity_bytes=8 * MIB)
    await pool.clone(source, large, copying=soon())
    content = image_of(tmp_path, large).read_bytes()
    assert content == image_of(tmp_path, source).read_bytes() + bytes(4 * MIB)


async def test_a_copy_does_not_follow_later_writes(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume())
    await pool.snapshot(source, a_snapshot(), copying=soon())
    with image_of(tmp_path, source).open("r+b") as image:
        image.seek(MIB)
        image.write(b"NEWS")
    assert image_of(tmp_path, a_snapshot()).read_bytes()[MIB : MIB + 4] == b"data"


async def test_a_copy_past_its_deadline_is_given_up_and_leaves_nothing(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume())
    before = files_below(tmp_path)
    with pytest.raises(DeadlineExceeded, match="XFS or btrfs"):
        await pool.snapshot(source, a_snapshot(), copying=Copying(time.monotonic() - 1))
    assert files_below(tmp_path) == before


async def test_a_copy_that_nobody_waits_for_any_more_ends_and_leaves_nothing(pool, tmp_path, monkeypatch):
    """Its thread went on, and an image that no record knew of appeared hours later."""
    source = await filled(pool, tmp_path, a_volume(), pattern=os.urandom(MIB))
    begun, go_on = threading.Event(), threading.Event()

    def cannot(*_args):
        return False

    def gated(*args):
        begun.set()
        go_on.wait(30)
        return copy_chunk(*args)

    copy_chunk = copying._copy_chunk
    monkeypatch.setattr(copying, "_reflink", cannot)
    monkeypatch.setattr(copying, "_copy_chunk", gated)
    before = files_below(tmp_path)
    making = asyncio.create_task(pool.clone(source, a_volume("clone"), copying=soon()))
    await asyncio.to_thread(begun.wait, 30)
    making.cancel()
    await asyncio.sleep(0.1)
    assert not making.done()  # its thread may still do anything
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await making
    assert files_below(tmp_path) == before


async def test_a_copy_tells_how_far_it_is(pool, tmp_path, monkeypatch):
    source = await filled(pool, tmp_path, a_volume(), pattern=os.urandom(MIB))
    monkeypatch.setattr(copying, "_reflink", lambda *_: False)
    told = soon()
    await pool.clone(source, a_volume("clone"), copying=told)
    assert told.copied_bytes == told.total_bytes == MIB


async def test_copy_of_a_truncated_source_is_data_loss_and_leaves_nothing(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume())
    os.truncate(image_of(tmp_path, source), MIB)
    before = files_below(tmp_path)
    with pytest.raises(DataLoss, match="ends at 1048576 bytes, it should have 4194304"):
        await pool.clone(source, a_volume("clone"), copying=soon())
    assert files_below(tmp_path) == before


async def test_copy_of_a_missing_source_is_data_loss_and_names_it(pool, tmp_path):
    await pool.check()
    with pytest.raises(DataLoss, match=str(image_of(tmp_path, a_volume()))):
        await pool.clone(a_volume(), a_volume("clone"), copying=soon())


async def test_expand_grows_and_never_shrinks(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    await pool.expand(volume, 8 * MIB)
    assert image_of(tmp_path, volume).stat().st_size == 8 * MIB
    await pool.expand(volume, 4 * MIB)
    assert image_of(tmp_path, volume).stat().st_size == 8 * MIB
    assert image_of(tmp_path, volume).read_bytes()[MIB : MIB + 4] == b"data"


async def test_expand_of_a_truncated_image_is_data_loss(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    os.truncate(image_of(tmp_path, volume), MIB)
    with pytest.raises(DataLoss, match="has 1048576 bytes, the volume has 4194304"):
        await pool.expand(volume, 8 * MIB)
    assert image_of(tmp_path, volume).stat().st_size == MIB


async def test_expand_beyond_what_the_file_system_holds_is_out_of_range(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    with pytest.raises(OutOfRange, match="does not hold files of this size"):
        await pool.expand(volume, (1 << 63) - 4096)


async def test_delete_leaves_nothing_and_can_be_repeated(pool, tmp_path):
    await pool.check()
    before = files_below(tmp_path)
    source = await filled(pool, tmp_path, a_volume())
    await pool.snapshot(source, a_snapshot(), copying=soon())
    for _ in range(2):
        await pool.delete_volume(source.id)
        await pool.delete_snapshot(a_snapshot().id)
    assert files_below(tmp_path) == before


async def test_a_snapshot_outlives_its_volume(pool, tmp_path):
    source = await filled(pool, tmp_path, a_volume())
    await pool.snapshot(source, a_snapshot(), copying=soon())
    await pool.delete_volume(source.id)
    await pool.restore(a_snapshot(), a_volume("restored"), copying=soon())
    assert image_of(tmp_path, a_volume("restored")).read_bytes()[MIB : MIB + 4] == b"data"


async def test_problem_tells_a_missing_and_a_truncated_image(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    assert await pool.problem(volume) == ""
    os.truncate(image_of(tmp_path, volume), MIB)
    assert "truncated" in await pool.problem(volume)
    image_of(tmp_path, volume).unlink()
    assert "missing" in await pool.problem(volume)


async def test_a_disk_that_fails_is_a_problem_of_its_volume_and_not_of_the_list(pool, monkeypatch):
    def broken(_volume):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(pool, "_verify", broken)
    assert "Input/output error" in await pool.problem(a_volume())


async def test_clean_removes_only_what_is_unfinished(pool, tmp_path):
    volume = await filled(pool, tmp_path, a_volume())
    kept = files_below(tmp_path)
    for part in ("volumes", "snapshots"):
        unfinished = tmp_path / "pool" / part / "vol-0123456789abcdef.0a1b2c3d.tmp"
        unfinished.mkdir(parents=True)
        (unfinished / "image.raw").write_bytes(b"half")
    await pool.clean()
    assert files_below(tmp_path) == kept
    assert await pool.has_volume(volume.id)


async def test_clean_that_is_given_up_leaves_what_was_begun_since(pool, tmp_path, monkeypatch):
    """It went on in its thread, listed the snapshots after its first removal, and took one that was being cut."""
    (tmp_path / "pool/volumes/vol-0.0a1b2c3d.tmp").mkdir(parents=True)
    removing, go_on = threading.Event(), threading.Event()

    def slow(path):
        removing.set()
        go_on.wait()
        remove_tree(path)
        removed.set()

    removed = threading.Event()
    monkeypatch.setattr(file, "remove_tree", slow)
    monkeypatch.setattr(file, "DEFAULT_TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded):
        await pool.clean()
    monkeypatch.undo()
    assert removing.is_set()
    begun = tmp_path / "pool/snapshots/snap-0.0a1b2c3d.tmp"
    begun.mkdir(parents=True)
    go_on.set()
    removed.wait()
    pool.close()
    pool._small._executor.shutdown()
    assert not (tmp_path / "pool/volumes/vol-0.0a1b2c3d.tmp").exists()
    assert begun.exists()


async def test_clean_that_is_given_up_while_it_lists_removes_nothing(pool, tmp_path, monkeypatch):
    half = tmp_path / "pool/volumes/vol-0.0a1b2c3d.tmp"
    half.mkdir(parents=True)
    go_on = threading.Event()
    monkeypatch.setattr(pool, "_check", go_on.wait)
    monkeypatch.setattr(file, "DEFAULT_TIMEOUT_S", 0.05)
    with pytest.raises(DeadlineExceeded):
        await pool.clean()
    go_on.set()
    pool._small._executor.shutdown()
    assert half.exists()


async def test_an_image_that_vanished_while_it_was_made_is_an_error_and_leaves_nothing(
    pool, tmp_path, monkeypatch
):
    """The record made its directory anew, and a copy that was only a meta.json was renamed to a whole one."""
    source = await filled(pool, tmp_path, a_volume())
    before = files_below(tmp_path)

    def copy(*args, **kwargs):
        original(*args, **kwargs)
        for unfinished in tmp_path.glob("pool/snapshots/*.tmp"):
            shutil.rmtree(unfinished)

    original = copying.copy_image
    monkeypatch.setattr(file, "copy_image", copy)
    with pytest.raises(FailedPrecondition, match="vanished"):
        await pool.snapshot(source, a_snapshot(), copying=soon())
    assert files_below(tmp_path) == before
    assert not image_of(tmp_path, a_snapshot()).parent.exists()


async def test_usage_tells_ours_from_foreign(pool, tmp_path):
    before = await pool.usage()
    source = await filled(pool, tmp_path, a_volume(), pattern=os.urandom(3 * MIB), at=0)
    await pool.snapshot(source, a_snapshot(), copying=soon())
    os.sync()
    after = await pool.usage()
    assert after.total_bytes == before.total_bytes
    assert after.snapshot_bytes - before.snapshot_bytes >= 3 * MIB
    assert await pool.allocated_bytes(source) >= 3 * MIB
    assert await pool.allocated_bytes(a_volume("none")) == 0


# What can be wrong with a pool.


async def test_a_missing_pool_is_refused_and_not_made(pool, tmp_path):
    (tmp_path / "pool").rmdir()
    with pytest.raises(FailedPrecondition, match="create or mount it"):
        await pool.create(a_volume())
    assert not (tmp_path / "pool").exists()


async def test_a_pool_that_is_a_file_is_refused(pool, tmp_path):
    (tmp_path / "pool").rmdir()
    (tmp_path / "pool").write_text("")
    with pytest.raises(FailedPrecondition, match="is not a directory"):
        await pool.create(a_volume())


async def test_an_unmounted_pool_is_not_taken_for_an_empty_one(pool, tmp_path):
    await pool.create(a_volume())
    (tmp_path / "pool").rename(tmp_path / "elsewhere")
    (tmp_path / "pool").mkdir()
    for call in (pool.create(a_volume("w")), pool.delete_volume(a_volume().id), pool.usage(), pool.clean()):
        with pytest.raises(FailedPrecondition, match=r"pool\.json is missing or differs"):
            await call
    assert list((tmp_path / "pool").iterdir()) == []


async def test_another_pool_in_its_place_is_refused(pool, tmp_path):
    await pool.check()
    shutil.rmtree(tmp_path / "pool")
    (tmp_path / "other").mkdir()
    other = a_pool(tmp_path / "other")
    await other.check()
    other.close()
    (tmp_path / "other/pool").rename(tmp_path / "pool")
    with pytest.raises(FailedPrecondition, match="not the pool that was used before"):
        await pool.create(a_volume())


async def test_a_pool_is_known_again_after_the_state_directory_was_lost(pool, tmp_path):
    await pool.create(a_volume())
    (tmp_path / "memory.json").unlink()
    assert await pool.has_volume(a_volume().id)


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.ENOSPC, ResourceExhausted),
        (errno.EDQUOT, ResourceExhausted),
        (errno.EFBIG, OutOfRange),
        (errno.EROFS, PermissionDenied),
        (errno.EIO, Unavailable),
    ],
)
async def test_a_fault_of_the_file_system_has_its_class_and_leaves_nothing(
    pool, tmp_path, refuse, number, error
):
    await pool.check()
    before = files_below(tmp_path)
    refuse("ftruncate", number)
    with pytest.raises(error, match="pool 'default'"):
        await pool.create(replace(a_volume()))
    assert files_below(tmp_path) == before


async def test_a_really_full_pool_is_exhausted_and_leaves_nothing(tmp_path):
    """A copy that meets ENOSPC half-way, on a real file system of a few MiB."""
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    (tmp_path / "pool").mkdir()
    mounted = os.system(f"mount -t tmpfs -o size=6m tmpfs {tmp_path}/pool") == 0
    if not mounted:
        pytest.skip("this machine does not let us mount")
    try:
        pool = a_pool(tmp_path)
        source = await filled(pool, tmp_path, a_volume(), pattern=os.urandom(4 * MIB), at=0)
        before = files_below(tmp_path)
        with pytest.raises(ResourceExhausted, match="make room"):
            await pool.clone(source, a_volume("clone"), copying=soon())
        assert files_below(tmp_path) == before
        pool.close()
    finally:
        os.system(f"umount {tmp_path}/pool")


def test_where_a_pool_is_and_how_long_it_may_hold():
    assert file.parse_location("/pool") == file.FileLocation(Path("/pool"), 10)
    assert file.parse_location("/pool?max-hold-seconds=120") == file.FileLocation(Path("/pool"), 120)
    for wrong, said in (
        ("/pool?max-hold-seconds=", "is not 0 to 295"),
        ("/pool?max-hold-seconds=296", "is not 0 to 295"),
        ("/pool?max-hold-seconds=-1", "is not 0 to 295"),
        ("/pool?hold=1", "unknown option 'hold'"),
    ):
        with pytest.raises(InvalidArgument, match=said):
            open_pools([parse_pool(f"p=file:{wrong}")], Path("/state"))


async def test_whether_copies_share_blocks_is_tried(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(copying.fcntl, "ioctl", lambda *_: 0)
    assert await pool.shares_blocks()

    def cannot(*_):
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(copying.fcntl, "ioctl", cannot)
    assert not await pool.shares_blocks()
    assert [path.name for path in (tmp_path / "pool").rglob("*") if path.is_file()] == []


@pytest.mark.parametrize(("fs", "shares"), [("xfs", True), ("btrfs", True), ("ext4", False)])
async def test_file_systems_that_share_blocks_are_known(tmp_path, fs, shares):
    if not loop_works():
        pytest.skip("no loop devices here (needs root)")
    image, place = tmp_path / "image", tmp_path / "place"
    image.touch()
    os.truncate(image, 320 * MIB)
    place.mkdir()
    subprocess.run([f"mkfs.{fs}", "-q", image], check=True)
    subprocess.run(["mount", "-o", "loop", image, place], check=True)
    try:
        assert copying.can_share_blocks(place) is shares
    finally:
        subprocess.run(["umount", place], check=True)
