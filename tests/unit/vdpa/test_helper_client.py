"""The netlink helper: its errors mean what the kernel meant, and one that hangs is replaced."""

from __future__ import annotations

import errno
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from csi_vduse.errors import (
    AlreadyExists,
    DeadlineExceeded,
    FailedPrecondition,
    PermissionDenied,
    Unavailable,
    VduseError,
)
from csi_vduse.vdpa.helper_client import NetlinkHelper
from csi_vduse.vdpa.sysfs import Roots, Sysfs

# Answers with the error number that the request's name spells; "hang" and "die" do so; "ok" succeeds.
PROGRAM = """
import json, os, sys, time
print(json.dumps({"ok": True, "result": "ready"}), flush=True)
for line in sys.stdin:
    name = json.loads(line).get("name", "ok")
    if name == "hang":
        time.sleep(600)
    if name == "die":
        sys.exit(1)
    answer = {"ok": True, "result": [os.getpid()]}
    if name.isdigit():
        answer = {"ok": False, "errno": int(name), "message": "the kernel said no"}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture
async def helper(tmp_path: Path) -> AsyncIterator[NetlinkHelper]:
    bus = tmp_path / "sys/bus/vdpa"
    bus.mkdir(parents=True)
    (bus / "drivers_autoprobe").write_text("1\n")
    made = NetlinkHelper(
        tmp_path, argv=(sys.executable, "-c", PROGRAM), sysfs=Sysfs(Roots(sys=tmp_path / "sys"))
    )
    yield made
    await made.close()


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (errno.EEXIST, AlreadyExists),
        (errno.EPERM, PermissionDenied),
        (errno.ENOENT, FailedPrecondition),
        (errno.EINVAL, FailedPrecondition),
        (errno.EAGAIN, Unavailable),
        (errno.ETIMEDOUT, DeadlineExceeded),
        (errno.EIO, VduseError),
    ],
)
async def test_error_numbers_become_errors(helper: NetlinkHelper, number: int, error: type[VduseError]):
    with pytest.raises(error) as caught:
        await helper.add(str(number), "virtio_vdpa", timeout_s=10)
    assert type(caught.value) is error


async def test_removing_what_is_not_there_is_fine(helper: NetlinkHelper):
    await helper.remove(str(errno.ENODEV), timeout_s=10)


@pytest.mark.parametrize(("name", "error"), [("hang", DeadlineExceeded), ("die", Unavailable)])
async def test_a_helper_that_hangs_or_dies_is_replaced_and_its_traces_mended(
    helper: NetlinkHelper, tmp_path: Path, name: str, error: type[VduseError]
):
    (first,) = await helper.devices(timeout_s=10)
    switch = tmp_path / "sys/bus/vdpa/drivers_autoprobe"
    switch.write_text("0\n")
    (tmp_path / "autoprobe-off").touch()
    with pytest.raises(error):
        await helper.add(name, "virtio_vdpa", timeout_s=0.5)
    assert switch.read_text() == "1"
    (second,) = await helper.devices(timeout_s=10)
    assert first != second
    assert not Path(f"/proc/{first}").exists()


async def test_the_real_helper_reports_a_kernel_without_vdpa(tmp_path: Path, has_no_vdpa: Callable[[], bool]):
    if not has_no_vdpa():
        pytest.skip("this machine has vDPA: tests/vm covers it")
    helper = NetlinkHelper(tmp_path)
    with pytest.raises(VduseError) as caught:
        await helper.devices(timeout_s=60)
    assert isinstance(caught.value, FailedPrecondition), caught.value
    assert "modprobe" in caught.value.hint
    await helper.close()


@pytest.fixture
def has_no_vdpa() -> Callable[[], bool]:
    return lambda: not Path("/sys/bus/vdpa").exists()
