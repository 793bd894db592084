"""Writes to a volume, reads back, compares, and tells how long it had to wait: what a pod of the demo runs.

    python3 writer.py FILE STOP

Each block has a content that its number and the count of its writes decide, so a block that is old, torn or another's
is seen. Writes are direct and durable (O_DIRECT, O_DSYNC), one after the other. Once a second a line says how many
there were and the longest time that one of them took. When the file STOP appears every block is read and compared;
exit code 0 says that no request failed and that every byte was what it had to be. Needs Python and nothing else.
"""

import hashlib
import mmap
import os
import random
import sys
import time
from pathlib import Path

BLOCK_BYTES = 4096
BLOCKS = 512
_READ_EVERY = 8


def content(block: int, count: int) -> bytes:
    """What a block holds after its `count`th write."""
    digest = hashlib.blake2b(f"{block}:{count}".encode()).digest()
    return digest * (BLOCK_BYTES // len(digest))


class Wrong(Exception):
    """A block does not hold what was written to it."""


class Blocks:
    """The file, and what was written to it."""

    def __init__(self, path: str) -> None:
        """Write every block once."""
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_DIRECT | os.O_DSYNC, 0o600)
        self._buffer = mmap.mmap(-1, BLOCK_BYTES)  # as aligned as O_DIRECT wants it
        self._counts = [0] * BLOCKS
        for block in range(BLOCKS):
            self.write(block)

    def write(self, block: int) -> None:
        """Write a block once more."""
        self._buffer[:] = content(block, self._counts[block] + 1)
        if os.pwritev(self._fd, [self._buffer], block * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError(f"a write of block {block} was cut short")
        self._counts[block] += 1

    def compare(self, block: int) -> None:
        """Read a block and compare it.

        Raises Wrong.
        """
        if os.preadv(self._fd, [self._buffer], block * BLOCK_BYTES) != BLOCK_BYTES:
            raise OSError(f"a read of block {block} was cut short")
        if self._buffer[:] != content(block, self._counts[block]):
            raise Wrong(f"block {block} is not what its write number {self._counts[block]} was")

    def compare_all(self) -> None:
        """Compare every block."""
        for block in range(BLOCKS):
            self.compare(block)


def main(path: str, stop: str) -> int:
    """Write until told to stop; the exit code."""
    blocks = Blocks(path)
    print("ready", flush=True)
    writes, longest_s, told_at = 0, 0.0, time.monotonic()
    while not Path(stop).exists():
        began = time.monotonic()
        blocks.write(random.randrange(BLOCKS))  # noqa: S311 -- no secret
        writes += 1
        if writes % _READ_EVERY == 0:
            blocks.compare(random.randrange(BLOCKS))  # noqa: S311 -- no secret
        now = time.monotonic()
        longest_s = max(longest_s, now - began)
        if now - told_at >= 1:
            print(f"{writes} writes, the longest waited {longest_s * 1000:.0f} ms", flush=True)
            longest_s, told_at = 0.0, now
    blocks.compare_all()
    print(f"{writes} writes, all {BLOCKS} blocks are what was written last", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
