"""A disk's own account of itself in sysfs: which volume it is, how large, whether it can be written.

The serial is fetched from the worker by a request on the ring (virtio-blk GET_ID), so reading it can hang;
a child process reads, with a deadline.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.errors import CommandFailed, FailedPrecondition, Unavailable
from csi_vduse.node.mounts import DeviceNumber
from csi_vduse.run import run

READ_TIMEOUT_S = 30.0
RESIZE_TIMEOUT_S = 60.0
_SERIAL_BYTES = 20  # VIRTIO_BLK_ID_BYTES
_SECTOR_BYTES = 512  # of sysfs, whatever the device's block size (sysfs-block)
_POLL_S = 0.05


@dataclass(frozen=True)
class Disk:
    """What sysfs says of a disk."""

    serial: str
    size_bytes: int
    read_only: bool


async def read_disk(sysfs: Path, number: DeviceNumber) -> Disk:
    """Read serial, size and the read-only mark of a disk.

    Raises:
        Unavailable: there is no such disk, or it has no serial.
        DeadlineExceeded: its worker does not answer.
    """
    directory = sysfs / "dev/block" / str(number)
    try:
        output = await run(
            ["head", "-q", "-n", "1", *(str(directory / name) for name in ("size", "ro", "serial"))],
            timeout_s=READ_TIMEOUT_S,
        )
    except CommandFailed as error:
        raise Unavailable(
            f"disk {number} cannot be read in sysfs: {error.output.strip()}", hint="retry"
        ) from error
    # A serial of the full 20 bytes comes without a newline; it is last for that reason.
    size, read_only, serial = [*output.stdout.split("\n"), ""][:3]
    return Disk(serial.strip("\0"), int(size) * _SECTOR_BYTES, read_only == "1")


async def prove_disk(
    sysfs: Path, number: DeviceNumber, *, volume_id: str, serial: str, size_bytes: int, read_only: bool
) -> None:
    """See that the disk is the volume and not another one that has got the same name.

    serial: that the volume was attached with, AttachSpec.disk_serial.

    Raises:
        FailedPrecondition: it is another one, or has another size or mode.
        Unavailable, DeadlineExceeded: as for read_disk.
    """
    disk = await read_disk(sysfs, number)
    wanted = Disk(serial.encode()[:_SERIAL_BYTES].decode(errors="replace"), size_bytes, read_only)
    if disk != wanted:
        raise FailedPrecondition(
            f"disk {number} is not what volume {volume_id} should be: found {disk}, expected {wanted}",
            hint="nothing was changed; compare `csi-vduse volume inspect` with the registry",
        )


async def wait_for_size(sysfs: Path, number: DeviceNumber, size_bytes: int) -> None:
    """Wait until the block layer has taken over a new capacity from the config interrupt.

    Raises:
        Unavailable: it has not within the deadline.
    """
    size_file = sysfs / "dev/block" / str(number) / "size"
    deadline_s = asyncio.get_running_loop().time() + RESIZE_TIMEOUT_S
    # The size attribute is kept by the block layer: reading it asks nobody. A change of it sends no event
    # that can be waited for without a netlink socket of its own.
    while (now_bytes := int(size_file.read_text()) * _SECTOR_BYTES) != size_bytes:
        if asyncio.get_running_loop().time() > deadline_s:
            raise Unavailable(
                f"disk {number} still has {now_bytes} bytes and not {size_bytes}",
                hint="retry; is its worker alive?",
            )
        await asyncio.sleep(_POLL_S)
