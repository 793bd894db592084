"""A VM's disk behind the socket: a file system is made, filled, checked in the guest, and checked again outside."""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab.kernel import Kernel, obtain
from tests.vhost_user.conftest import IMAGE_BYTES
from tests.vhost_user.exported import Exported
from tests.vhost_user.guest import Guest

FILE_SYSTEM = """
set -e
cat /sys/block/vda/serial; echo
mkfs.ext4 -q -F $D
mount -t ext4 $D /mnt
dd if=/dev/urandom of=/mnt/data bs=64k count=256 2>/dev/null
dd if=/mnt/data of=/mnt/odd bs=1537 count=999 2>/dev/null
sync
echo 3 > /proc/sys/vm/drop_caches
echo "SUM: $(sha256sum < /mnt/data)"
rm /mnt/odd
umount /mnt
echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/unbind
echo virtio0 > /sys/bus/virtio/drivers/virtio_blk/bind
mount -t ext4 $D /mnt
echo "AGAIN: $(sha256sum < /mnt/data)"
fstrim /mnt || echo no fstrim
umount /mnt
echo "PACKED: $(cut -c35 /sys/block/vda/device/features)"
echo "QUEUES: $(ls /sys/block/vda/mq | wc -l)"
"""

# Several writers at once, each waiting for the disk at every step: requests are in flight whenever the server dies.
ROUNDS = """
mkfs.ext4 -q -F $D
mount -t ext4 -o sync $D /mnt
dd if=/dev/urandom of=/tmp/random bs=4k count=400 2>/dev/null
round=0
while [ $round -lt 16 ]; do
    for writer in 1 2 3 4 5 6; do
        dd if=/tmp/random skip=$((round * 10 + writer * 20)) of=/mnt/$round.$writer bs=4k count=24 \\
            2>/dev/null &
    done
    wait
    (cd /mnt; sha256sum $round.*) >> /tmp/sums
    echo "ROUND: $round."
    round=$((round + 1))
done
sync
echo 3 > /proc/sys/vm/drop_caches
(cd /mnt; sha256sum -c /tmp/sums | grep -v OK && exit 1; echo "CHECKED: $(wc -l < /tmp/sums)")
echo "SUM: $(sha256sum < /mnt/7.3)"; mv /mnt/7.3 /mnt/data
umount /mnt
dmesg | grep -i "error" | grep -E "vda|EXT4" && exit 1
true
"""

GROWING = """
echo "SECTORS: $(cat /sys/block/vda/size)."
while [ $(cat /sys/block/vda/size) = 131072 ]; do sleep 0.2; done
echo "SECTORS: $(cat /sys/block/vda/size)."
dd if=/dev/zero of=$D bs=1M seek=96 count=1 oflag=direct 2>/dev/null
"""


@pytest.fixture
def kernel() -> Kernel:
    return obtain()


@pytest.fixture
def boot(tmp_path: Path, kernel: Kernel) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def start(socket: Path, script: str, **options: object) -> Guest:
        guests.append(Guest(tmp_path / f"guest{len(guests)}", kernel, socket, script, **options))
        return guests[-1]

    yield start
    for guest in guests:
        guest.kill()


def checked_sum(image: Path, tmp_path: Path) -> str:
    """The checksum of the guest's file, read from the image without mounting it."""
    check = subprocess.run(
        ["e2fsck", "-fn", str(image)], capture_output=True, text=True, timeout=120, check=False
    )
    assert check.returncode == 0, check.stdout
    copy = tmp_path / "data"
    subprocess.run(
        ["debugfs", "-R", f"dump data {copy}", str(image)], capture_output=True, timeout=120, check=True
    )
    return hashlib.sha256(copy.read_bytes()).hexdigest()


def printed_sum(console: str) -> str:
    found = re.search(r"SUM: ([0-9a-f]{64})", console)
    assert found, console
    return found[1]


@pytest.mark.parametrize(("queues", "packed"), [(1, False), (2, False), (2, True)])
def test_a_guest_makes_and_fills_a_file_system(
    queues: int,
    packed: bool,
    export: Callable[..., Exported],
    boot: Callable[..., Guest],
    image: Path,
    tmp_path: Path,
) -> None:
    exported = export(f"file:{image}", "--queues", "2")
    console = boot(exported.socket, FILE_SYSTEM, queues=queues, packed=packed).wait_until_done()
    assert f"QUEUES: {queues}" in console
    assert f"PACKED: {int(packed)}" in console
    assert "a-disk" in console
    assert exported.stop() == 0
    assert printed_sum(console) == checked_sum(image, tmp_path)
    assert f"AGAIN: {printed_sum(console)}" in console
    assert "broke" not in exported.log_text()


@pytest.mark.parametrize("packed", [False, True])
def test_a_guest_goes_on_when_the_server_is_killed_and_started_again(
    packed: bool, export: Callable[..., Exported], boot: Callable[..., Guest], image: Path, tmp_path: Path
) -> None:
    exported = export(f"file:{image}", "--queues", "2")
    guest = boot(exported.socket, ROUNDS, queues=2, packed=packed, reconnect=True)
    for kill, pause_s in enumerate((0.0, 1.5, 0.3, 0.0, 0.0)):
        guest.wait_for(f"ROUND: {2 * kill}.")
        time.sleep(0.1 + 0.07 * kill)  # the next round's writers have begun
        exported.kill()
        time.sleep(pause_s)
        exported.start()
    console = guest.wait_until_done()
    assert "CHECKED: 96" in console
    assert exported.stop() == 0
    assert printed_sum(console) == checked_sum(image, tmp_path)
    assert "broke" not in exported.log_text()


def test_a_guest_sees_its_disk_grow(
    export: Callable[..., Exported], boot: Callable[..., Guest], image: Path
) -> None:
    exported = export(f"file:{image}")
    guest = boot(exported.socket, GROWING)
    guest.wait_for("SECTORS: 131072.")
    os.truncate(image, 2 * IMAGE_BYTES)
    os.kill(exported.pid, signal.SIGHUP)
    assert "SECTORS: 262144." in guest.wait_until_done()
