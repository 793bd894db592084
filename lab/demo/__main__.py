"""The demo: one volume's life, told and checked, with a driver that knows nothing of being shown.

Run by `make demo` in a machine with a VDUSE kernel. What is kept true: each claim is compared by content or
with the kernel's own view, and the first that fails ends the demo with 1 and the driver's log.
"""

import hashlib
import os
import random
import sys
import time
import urllib.request
from dataclasses import dataclass, field
from pathlib import Path

import grpc

from csi_vduse.proto import csi_pb2
from lab import vhost_client
from lab.demo import driver as drivers
from lab.demo import look
from lab.demo.driver import Driver, Use
from lab.demo.story import ClaimFailed, Story
from lab.errors import LabError
from lab.host import run

MIB = 1 << 20
SIZE_BYTES = 128 * MIB
LARGER_BYTES = 256 * MIB
RAW_BYTES = 32 * MIB
# Bytes that are nowhere else, the same in every run.
_BYTES = random.Random(20261123)  # noqa: S311 -- test data
EXT4 = drivers.filesystem("ext4")
RAW = drivers.block()


@dataclass
class Shown:
    """What one step leaves for the next ones."""

    story: Story
    driver: Driver
    volume_id: str = ""
    files: dict[str, str] = field(default_factory=dict)
    for_vm: bytes = b""
    made: list[str] = field(default_factory=list)


def main() -> int:
    """Tell the whole story; the exit code."""
    story = Story()
    started = time.monotonic()
    try:
        client = vhost_client.obtain()
        run(["modprobe", "-a", "vduse", "virtio-vdpa", "vhost-vdpa"], timeout_s=60)
        story.step("Start the driver: `csi-vduse standalone`, one pool of files")
        with drivers.running() as driver:
            tell(Shown(story, driver), client)
    except ClaimFailed as error:
        print(f"\ndemo: FAILED: {error}", flush=True)
        return 1
    except (LabError, OSError, grpc.RpcError) as error:
        said = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else error
        print(f"\ndemo: FAILED: {said}", flush=True)
        return 1
    print(f"\ndemo: all {story.claims} claims hold, {time.monotonic() - started:.0f} s", flush=True)
    return 0


def tell(shown: Shown, client: vhost_client.VhostClient) -> None:
    """The steps, in order."""
    introduce(shown)
    create(shown)
    pod = publish_and_write(shown)
    show_disk(shown, pod)
    expand(shown, pod)
    pod = detach_and_return(shown, pod)
    show_metrics(shown)
    copy(shown, pod)
    raw_block(shown)
    give_to_vm(shown, pod, client)
    delete_everything(shown)


def introduce(shown: Shown) -> None:
    """Who answers, and on what kernel."""
    info = shown.driver.identity.GetPluginInfo(csi_pb2.GetPluginInfoRequest(), timeout=30)
    shown.story.seen(f"Linux {os.uname().release}, driver {info.name} {info.vendor_version}")
    for device in look.devices():
        shown.story.seen(f"VDUSE device {device}, which is not ours")
    shown.story.check(not look.devices(), "it is ready, and the machine has no VDUSE device yet")


def create(shown: Shown) -> None:
    """CreateVolume."""
    shown.story.step("Create a volume")
    shown.story.asked(f"CreateVolume, {SIZE_BYTES // MIB} MiB, ext4, one writer")
    volume = shown.driver.create("demo", SIZE_BYTES, EXT4)
    shown.volume_id = volume.volume_id
    shown.made.append(volume.volume_id)
    status = shown.driver.places.image(volume.volume_id).stat()
    shown.story.seen(f"{volume.volume_id}; its image takes {status.st_blocks * 512} bytes of the pool")
    same = volume.capacity_bytes == status.st_size == SIZE_BYTES
    shown.story.check(same, "volume and image have the size that was asked for")


def publish_and_write(shown: Shown) -> Use:
    """NodeStageVolume, NodePublishVolume, and files with checksums."""
    story = shown.story
    story.step("Stage and publish it, and write to it as a pod does")
    story.asked("NodeStageVolume, NodePublishVolume")
    pod = shown.driver.use(shown.volume_id, EXT4, "pod-1")
    story.seen(f"df: {look.usage(pod.target)}")
    mounted = str(pod.target) in look.mounts(shown.driver.places.run)
    story.check(mounted and "ext4" in look.usage(pod.target), "an ext4 file system is where the pod looks")
    contents = {"notes.txt": b"written by a pod\n" * 64, "data.bin": _BYTES.randbytes(8 * MIB)}
    shown.for_vm = contents["for-the-vm.bin"] = _BYTES.randbytes(64 * 1024)
    shown.files = {name: look.write(pod.target / name, content) for name, content in contents.items()}
    same_files(shown, pod, "3 files read back through the device, page cache dropped")
    return pod


def same_files(shown: Shown, pod: Use, text: str) -> None:
    """Compare what is on the disk with what was written."""
    found = look.checksums(pod.target)
    shown.story.check(found == shown.files, f"{text}: SHA-256 equal")


def show_disk(shown: Shown, pod: Use) -> None:
    """What the kernel says about the disk."""
    story = shown.story
    story.step("The disk behind it")
    at = shown.driver.attachment(shown.volume_id)
    disk = Path(at.path)
    drivers_seen = look.disk_driver(disk), look.bus_driver(at.device_name)
    story.seen(
        f"{disk}: driver {drivers_seen[0]}, over {drivers_seen[1]}, device /dev/vduse/{at.device_name}"
    )
    story.seen(f"served by process {at.worker_pid}; serial {look.serial(disk)}")
    story.check(look.usage(pod.target).startswith(f"{disk} "), f"the pod's mount is {disk}")
    story.check(drivers_seen == ("virtio_blk", "virtio_vdpa"), "virtio_blk drives it through virtio_vdpa")
    story.check(look.serial(disk) == shown.volume_id, "its serial number is the volume's id")


def expand(shown: Shown, pod: Use) -> None:
    """Grow while a file is open."""
    story = shown.story
    story.step("Expand it while the pod has a file open")
    before_bytes = look.size_bytes(pod.target)
    story.seen(f"df before: {look.usage(pod.target)}")
    story.asked(f"ControllerExpandVolume, NodeExpandVolume to {LARGER_BYTES // MIB} MiB")
    with (pod.target / "grown.log").open("wb") as file:
        file.write(b"before\n")
        capacity_bytes = shown.driver.expand(pod, LARGER_BYTES)
        file.write(b"after\n")
        file.flush()
        os.fsync(file.fileno())
    shown.files["grown.log"] = hashlib.sha256(b"before\nafter\n").hexdigest()
    story.seen(f"df after:  {look.usage(pod.target)}")
    after_bytes = look.size_bytes(pod.target)
    grown = capacity_bytes == LARGER_BYTES and after_bytes - before_bytes > 100 * MIB
    story.check(grown, f"the file system grew by {(after_bytes - before_bytes) // MIB} MiB, still mounted")
    same_files(shown, pod, "all files, and the one written across the growth")


def detach_and_return(shown: Shown, pod: Use) -> Use:
    """Unpublish, unstage, and do it all again."""
    story = shown.story
    story.step("Take it away from the node, and bring it back")
    story.asked("NodeUnpublishVolume, NodeUnstageVolume")
    shown.driver.end_use(pod)
    story.check(not look.devices(), "no VDUSE device is left")
    story.check(not look.mounts(shown.driver.places.run), "nothing is mounted")
    story.asked("NodeStageVolume, NodePublishVolume, for another pod")
    pod = shown.driver.use(shown.volume_id, EXT4, "pod-2")
    same_files(shown, pod, "all files are there")
    return pod


def show_metrics(shown: Shown) -> None:
    """A sample of what Prometheus gets."""
    story = shown.story
    story.step("Metrics")
    with urllib.request.urlopen(f"http://{drivers.METRICS_ADDRESS}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    shown_names = ("csi_vduse_volume_operations_total", "csi_vduse_volume_bytes_total")
    of_volume = [line for line in lines if line.startswith(shown_names) and f'"{shown.volume_id}"' in line]
    counts = [line for line in of_volume if not line.endswith(" 0.0")]
    story.seen("\n".join(counts))
    reads = [line for line in counts if 'operation="read"' in line and "bytes" in line]
    enough = bool(reads) and float(reads[0].split()[-1]) > 8 * MIB
    story.check(enough, "the worker counted at least the bytes that the pod read")


def copy(shown: Shown, pod: Use) -> None:
    """Snapshot, restore, clone."""
    story = shown.story
    story.step("Snapshot it, change it, restore the snapshot, clone the volume")
    look.drop_caches()
    story.asked("CreateSnapshot of the volume in use")
    snapshot = shown.driver.snapshot("demo-snapshot", shown.volume_id)
    story.seen(f"{snapshot.snapshot_id}, {snapshot.size_bytes} bytes")
    old = dict(shown.files)
    shown.files["notes.txt"] = look.write(pod.target / "notes.txt", b"changed after the snapshot\n")
    story.asked("CreateVolume from the snapshot, CreateVolume from the volume")
    restored = shown.driver.create("demo-restored", LARGER_BYTES, EXT4, snapshot_id=snapshot.snapshot_id)
    clone = shown.driver.create("demo-clone", LARGER_BYTES, EXT4, volume_id=shown.volume_id)
    for name, volume, wanted, text in (
        ("restored", restored, old, "the restored volume has the files as they were at the snapshot"),
        ("clone", clone, shown.files, "the clone has the files as they are now"),
    ):
        shown.made.append(volume.volume_id)
        use = shown.driver.use(volume.volume_id, EXT4, f"pod-{name}")
        story.check(look.checksums(use.target) == wanted, f"{text}: SHA-256 equal")
        shown.driver.end_use(use)
    same_files(shown, pod, "the volume itself")
    shown.made.append(snapshot.snapshot_id)


def raw_block(shown: Shown) -> None:
    """A volume without a file system."""
    story = shown.story
    story.step("A raw block volume")
    story.asked(f"CreateVolume, {RAW_BYTES // MIB} MiB, volumeMode Block; stage, publish")
    volume = shown.driver.create("demo-raw", RAW_BYTES, RAW)
    shown.made.append(volume.volume_id)
    use = shown.driver.use(volume.volume_id, RAW, "pod-raw")
    story.check(use.target.is_block_device(), "the pod has a block device node")
    content, offset_bytes = _BYTES.randbytes(MIB), 5 * MIB
    look.write_device(use.target, offset_bytes, content)
    same = look.read_device(use.target, offset_bytes, MIB) == content
    story.check(same, "1 MiB written with O_DIRECT is read back, byte for byte")
    with shown.driver.places.image(volume.volume_id).open("rb") as image:
        image.seek(offset_bytes)
        story.check(image.read(MIB) == content, "and stands in the pool's image at the same offset")
    shown.driver.end_use(use)


def give_to_vm(shown: Shown, pod: Use, client: vhost_client.VhostClient) -> None:
    """The first volume, bound to vhost_vdpa, read by QEMU's own client."""
    story = shown.story
    story.step("The same volume for a VM: bound to vhost_vdpa, read by a client that is not ours")
    extents = look.extents(pod.target / "for-the-vm.bin")
    story.seen(f"the pod's for-the-vm.bin is on its disk at (offset, length) {extents}")
    shown.driver.end_use(pod)
    before = look.disks()
    story.asked("Attach on the agent's socket, bus vhost_vdpa")
    at = shown.driver.attach_for_vm(shown.volume_id, LARGER_BYTES)
    story.seen(f"{at.path}, driver {look.bus_driver(at.device_name)}")
    story.check(
        look.bus_driver(at.device_name) == "vhost_vdpa" and Path(at.path).is_char_device(),
        "the device is bound to vhost_vdpa",
    )
    story.check(look.disks() == before, "the host has no disk for it")
    story.asked(f"{client.version()}, libblkio's virtio-blk-vhost-vdpa: read those blocks")
    content = b"".join(client.read(Path(at.path), *extent) for extent in extents)
    story.check(content == shown.for_vm, f"all {len(content)} bytes are what the pod wrote")
    shown.driver.detach(shown.volume_id)
    story.check(not look.devices(), "detached, no device is left")


def delete_everything(shown: Shown) -> None:
    """Delete, stop, and look for leftovers."""
    story, places = shown.story, shown.driver.places
    story.step("Delete everything and stop the driver")
    story.asked(f"DeleteVolume, DeleteSnapshot: {', '.join(shown.made)}")
    for made in shown.made:
        if made.startswith("snap-"):
            shown.driver.delete_snapshot(made)
        else:
            shown.driver.delete(made)
    story.check(not shown.driver.listed(), "the driver lists no volume and no snapshot")
    left = [*places.pool.glob("volumes/*"), *places.pool.glob("snapshots/*")]
    story.check(not left, "the pool is empty")
    code = shown.driver.stop()
    story.check(code == 0, "the driver ended with 0 on SIGTERM")
    left_over = look.devices() + look.mounts(places.run) + look.processes(str(places.run))
    story.check(not left_over, "no device, mount or process is left")


if __name__ == "__main__":
    sys.exit(main())
