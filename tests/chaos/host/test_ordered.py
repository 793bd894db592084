"""The checker of ordered writes finds what it has to find: it is itself tried on images that are wrong on purpose."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from lab.paths import CHECKOUT

PROGRAM = CHECKOUT / ".cache/chaos/ordered"
BLOCK = 4096
SLOTS = 64


def check(image: Path, flushed: int) -> tuple[int, str]:
    argv = [PROGRAM, "check", image, str(SLOTS * BLOCK), str(flushed)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    with path.open("wb") as file:
        file.truncate(SLOTS * BLOCK)
    return path


@pytest.fixture
def flushed(image: Path) -> int:
    """Writes some epochs; returns the last one told of."""
    argv = [PROGRAM, "write", image, str(SLOTS * BLOCK), "7"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        for line in writer.stdout:
            told = int(line.split()[1])
            if told == 20:
                writer.kill()
    return told


def numbers(image: Path) -> dict[int, int]:
    """The slot of every write that is there."""
    data = image.read_bytes()
    words = {
        slot: int.from_bytes(data[slot * BLOCK + 8 : slot * BLOCK + 16], "little") for slot in range(SLOTS)
    }
    return {number: slot for slot, number in words.items() if number}


def spoil(image: Path, slot: int, data: bytes, at: int = 0) -> None:
    with image.open("r+b") as file:
        file.seek(slot * BLOCK + at)
        file.write(data)


def test_an_image_that_was_cut_is_right(image: Path, flushed: int) -> None:
    code, said = check(image, flushed)
    assert code == 0, said


def test_a_flushed_epoch_that_is_gone_is_found(image: Path, flushed: int) -> None:
    for number, slot in numbers(image).items():
        if number > (flushed - 1) * 8:
            spoil(image, slot, bytes(BLOCK))
    code, said = check(image, flushed)
    assert code == 1
    assert "lost: epoch" in said


def test_an_older_write_that_is_missing_is_found_even_if_nobody_was_told_of_it(
    image: Path, flushed: int
) -> None:
    spoil(image, numbers(image)[(flushed - 2) * 8], bytes(BLOCK))
    code, said = check(image, 0)
    assert code == 1
    assert "missing: write" in said


def test_a_write_with_the_content_of_an_older_one_is_found(image: Path, flushed: int) -> None:
    here = numbers(image)
    slot = here[(flushed - 1) * 8]
    spoil(image, slot, b"\x01\x00", at=8)
    code, said = check(image, flushed)
    assert (code, "(torn)" in said) == (1, True), said
