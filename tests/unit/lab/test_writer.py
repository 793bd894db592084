"""The demo's writer sees what is not as it was written."""

import subprocess
import sys

import pytest

from lab.demo_kubernetes import writer


def test_it_writes_verifies_and_ends_when_told(tmp_path):
    (tmp_path / "stop").touch()
    argv = [sys.executable, writer.__file__, tmp_path / "file", tmp_path / "stop"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"0 writes, all {writer.BLOCKS} blocks are what was written last"


def test_a_block_that_went_back_to_an_earlier_content_is_seen(tmp_path):
    path = tmp_path / "file"
    blocks = writer.Blocks(str(path))
    blocks.write(7)
    blocks.compare_all()
    with path.open("r+b") as file:
        file.seek(7 * writer.BLOCK_BYTES)
        file.write(writer.content(7, 1))
    with pytest.raises(writer.Wrong, match="block 7"):
        blocks.compare_all()
