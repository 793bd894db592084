"""`csi-vduse export`: a device in the foreground, and its end."""

from __future__ import annotations

import subprocess
from pathlib import Path

from tests.vm.conftest import MIB, wait_until
from tests.vm.exports import exported


def vduse_devices() -> list[str]:
    return [path.name for path in Path("/sys/class/vduse").iterdir()]


def test_device_in_use_is_kept_and_an_idle_one_removed(image: Path, tmp_path: Path):
    mount = tmp_path / "mount"
    mount.mkdir()
    with exported("--backend", f"file:{image}", "--queues", "2", "foreground") as (device, process):
        subprocess.run(["mkfs.ext4", "-q", device], check=True, timeout=60)
        subprocess.run(["mount", device, mount], check=True, timeout=60)
        try:
            process.terminate()
            assert process.stderr is not None
            said = next(line for line in process.stderr if "still serving" in line)
            assert str(mount) in said
            (mount / "file").write_text("still there")
        finally:
            subprocess.run(["umount", mount], check=True, timeout=60)
        subprocess.run(["fsck.ext4", "-fn", device], check=True, timeout=60, capture_output=True)
        process.terminate()
        assert process.wait(120) == 0
    assert "foreground" not in vduse_devices()


def test_what_a_killed_export_left_is_removed_by_the_next(tmp_path: Path):
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(MIB)
    with exported("--backend", f"file:{image}", "killed") as (_, process):
        process.kill()
        process.wait()
    assert "killed" in vduse_devices()
    with exported("--backend", f"file:{image}", "killed") as (device, process):
        wait_until(device.is_block_device, "the second device")
        process.terminate()
        assert process.wait(120) == 0
    assert "killed" not in vduse_devices()
