"""Mount options may hold secrets (CSI, VolumeCapability.mount_flags): no error tells them."""

from pathlib import Path

import pytest

from csi_vduse.errors import CommandFailed, DeadlineExceeded, VduseError
from csi_vduse.node import mounts


@pytest.mark.parametrize(("script", "kind"), [("exit 32", CommandFailed), ("sleep 60", DeadlineExceeded)])
async def test_a_mount_that_fails_or_hangs_does_not_tell_its_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, kind: type[VduseError]
):
    program = tmp_path / "mount"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(mounts, "MOUNT_TIMEOUT_S", 1.0)
    with pytest.raises(kind) as caught:
        await mounts.mount_device("/dev/vdz", "/mnt", fs_type="ext4", options=["noatime", "key=hush"])
    assert "/dev/vdz" in str(caught.value)
    assert "hush" not in str(caught.value)
    assert "hush" not in repr(vars(caught.value))
