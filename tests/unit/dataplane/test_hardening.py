"""The engine as it was built: what makes a mistake in it harder to use is there (readelf(1), of the module itself)."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import pytest

from csi_vduse.dataplane import _engine


def _readelf(*options: str) -> str:
    return subprocess.run(
        ["readelf", "--wide", *options, _engine.__file__],
        check=True,
        capture_output=True,
        text=True,
        timeout=60,
    ).stdout


def test_addresses_of_functions_are_settled_and_read_only():
    assert "BIND_NOW" in _readelf("--dynamic")
    assert "GNU_RELRO" in _readelf("--program-headers")


def test_no_memory_is_both_written_and_executed():
    for line in _readelf("--program-headers").splitlines():
        if re.match(r"\s+(LOAD|GNU_STACK)\s", line):
            assert not re.search(r" RWE ", line), line


def test_stacks_and_lengths_are_checked():
    symbols = _readelf("--dyn-syms")
    assert "__stack_chk_fail" in symbols
    assert re.search(r"__\w+_chk\b", symbols.replace("__stack_chk_fail", ""))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="of this processor's own kind")
def test_only_what_is_jumped_to_can_be_jumped_to():
    # Not the module's note: the linker writes that only where all of the system's own objects have it.
    assert Path(_engine.__file__).read_bytes().count(b"\xf3\x0f\x1e\xfa") > 50  # endbr64
