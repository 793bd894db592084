"""An agent whose devices are loop devices: real disks, real mounts, no VDUSE.

Honest where it matters to the node: it refuses another spec for an attached volume, refuses to detach a disk
that is open or mounted, and its disks read and write the image. Serial and size are shown in a made sysfs,
because loop devices have no serial.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

from csi_vduse.agent.model import Attachment, AttachSpec, Bus, BusDevice, Probe, State
from csi_vduse.dataplane.backend_spec import FileBackend, NbdBackend
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import AlreadyExists, FailedPrecondition, NotFound, VduseError
from tests.unit.storage.nbd_client import NbdClient


def losetup(*arguments: str) -> str:
    return subprocess.run(["losetup", *arguments], check=True, capture_output=True, text=True).stdout.strip()


def _cut(serial: str) -> str:
    """What a disk answers to GET_ID, as sysfs shows it: 20 bytes (VIRTIO_BLK_ID_BYTES)."""
    return serial.encode()[:20].decode(errors="replace")


def detach_loop(path: str) -> None:
    """Detach, and wait for it: while somebody else has the loop device open it is put off."""
    losetup("--detach", path)
    backing = Path("/sys/block", Path(path).name, "loop/backing_file")
    deadline = time.monotonic() + 10
    while backing.exists():
        assert time.monotonic() < deadline, f"{path} stays"
        time.sleep(0.01)


def loop_works() -> bool:
    """Whether this machine lets us make and mount loop devices (root, not in a bare container)."""
    if os.geteuid() != 0:
        return False
    return subprocess.run(["losetup", "--find"], check=False, capture_output=True).returncode == 0


def can_grow_ext4() -> bool:
    """Whether we have CAP_SYS_RESOURCE (bit 24), without which ext4 refuses to grow online."""
    (line,) = (
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("CapEff:")
    )
    return bool(int(line.split()[1], 16) >> 24 & 1)


@dataclass
class LoopAgent:
    """See the module; `calls` lists what was asked, `fail` makes the named call raise."""

    directory: Path
    attachments: dict[str, Attachment] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    fail: dict[str, VduseError] = field(default_factory=dict)
    wrong_serial: str = ""
    problems: tuple[str, ...] = ()
    nbd_pool: Path | None = None
    nbd_image: str = ""

    @property
    def sysfs(self) -> Path:
        return self.directory / "sys"

    async def attach(self, spec: AttachSpec) -> Attachment:
        self._called("attach")
        present = self.attachments.get(spec.volume_id)
        if present is not None:
            if present.spec != spec:
                raise AlreadyExists("attached with other settings")
            return present
        device = self._make_vhost(spec) if spec.bus is Bus.VHOST else self._make_loop(spec)
        attachment = Attachment(spec, State.ATTACHED, device=device, worker_pid=1)
        self.attachments[spec.volume_id] = attachment
        return attachment

    async def detach(self, volume_id: str) -> None:
        self._called("detach")
        attachment = self.attachments.get(volume_id)
        if attachment is None:
            return
        assert attachment.device is not None
        path = str(attachment.device.path)
        if attachment.spec.bus is Bus.VHOST:
            os.unlink(path)  # noqa: PTH108
        else:
            try:
                os.close(os.open(path, os.O_RDONLY | os.O_EXCL))
            except OSError as error:
                raise FailedPrecondition(f"{path} is in use") from error
            detach_loop(path)
            shutil.rmtree(self._sysfs(attachment.device))
        del self.attachments[volume_id]

    async def resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        self._called("resize")
        attachment = self.attachments.get(volume_id)
        if attachment is None:
            raise NotFound("not attached")
        assert attachment.device is not None
        if attachment.spec.bus is Bus.VIRTIO:
            losetup("--set-capacity", str(attachment.device.path))
            self._show(attachment.device, replace(attachment.spec, capacity_bytes=capacity_bytes))
        attachment = replace(attachment, spec=replace(attachment.spec, capacity_bytes=capacity_bytes))
        self.attachments[volume_id] = attachment
        return attachment

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        self._called("throttle")
        attachment = self.attachments.get(volume_id)
        if attachment is None:
            raise NotFound("not attached")
        attachment = replace(attachment, spec=replace(attachment.spec, throttle=throttle))
        self.attachments[volume_id] = attachment
        return attachment

    async def list(self) -> tuple[Attachment, ...]:
        self._called("list")
        return tuple(self.attachments.values())

    async def probe(self) -> Probe:
        self._called("probe")
        return Probe("test", ready=not self.problems, problems=self.problems, max_volumes=7)

    def set_state(self, volume_id: str, state: State) -> None:
        self.attachments[volume_id] = replace(self.attachments[volume_id], state=state)

    def _called(self, name: str) -> None:
        self.calls.append(name)
        if name in self.fail:
            raise self.fail[name]

    def _make_loop(self, spec: AttachSpec) -> BusDevice:
        mode = ["--read-only"] if spec.read_only else []
        path = losetup("--find", "--show", *mode, str(self._image(spec)))
        number = os.stat(path).st_rdev  # noqa: PTH116
        device = BusDevice(Path(path), os.major(number), os.minor(number))
        self._show(device, spec)
        return device

    def _image(self, spec: AttachSpec) -> Path:
        """The file behind the backend; an export is asked whether it is what the attachment is to be."""
        if isinstance(spec.backend, FileBackend):
            return spec.backend.path
        assert isinstance(spec.backend, NbdBackend)
        assert self.nbd_pool is not None
        client = NbdClient(spec.backend.uri)
        client.close()
        assert (client.size_bytes, client.read_only) == (spec.capacity_bytes, spec.read_only)
        return self.nbd_pool / "volumes" / (self.nbd_image or spec.volume_id) / "image.raw"

    def _make_vhost(self, spec: AttachSpec) -> BusDevice:
        path = self.directory / f"vhost-vdpa-{spec.volume_id}"
        os.mknod(path, 0o20600, os.makedev(1, 3))
        return BusDevice(path, 1, 3)

    def _sysfs(self, device: BusDevice) -> Path:
        return self.sysfs / "dev/block" / f"{device.major}:{device.minor}"

    def _show(self, device: BusDevice, spec: AttachSpec) -> None:
        directory = self._sysfs(device)
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "size").write_text(f"{spec.capacity_bytes // 512}\n")
        (directory / "ro").write_text(f"{int(spec.read_only)}\n")
        (directory / "serial").write_text(self.wrong_serial or _cut(spec.disk_serial))
