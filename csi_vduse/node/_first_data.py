"""A program of its own: print the offset of the first block that is not zero, or "blank".

Run as `python -I -S _first_data.py DEVICE OFFSET:LENGTH...`, lengths multiples of 512. It reads a device
that may not answer, so it must be a process that can be left behind; it imports nothing of csi_vduse, so that
it starts fast.
"""

import os
import sys

_CHUNK_BYTES = 1 << 20
_BLOCK_BYTES = 512


def first_data(fd: int, offset: int, length: int) -> int | None:
    """Return where the first non-zero 512-byte block of a region begins.

    Raises:
        OSError: the device cannot be read.
        EOFError: it ends before the region does.
    """
    end = offset + length
    while offset < end:
        chunk = os.pread(fd, min(_CHUNK_BYTES, end - offset), offset)
        if not chunk:
            raise EOFError(f"no data at offset {offset}: the device is smaller than it says")
        if any(chunk):
            within = next(index for index, byte in enumerate(chunk) if byte)
            return offset + within // _BLOCK_BYTES * _BLOCK_BYTES
        offset += len(chunk)
    return None


def main(argv: list[str]) -> int:
    """Read the regions in turn; exit 1 with a message if one cannot be read."""
    try:
        fd = os.open(argv[1], os.O_RDONLY | os.O_CLOEXEC)
        for region in argv[2:]:
            offset, length = map(int, region.split(":"))
            found = first_data(fd, offset, length)
            if found is not None:
                print(found)  # noqa: T201
                return 0
    except (OSError, EOFError) as error:
        print(f"cannot read {argv[1]}: {error}", file=sys.stderr)  # noqa: T201
        return 1
    print("blank")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
