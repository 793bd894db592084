"""The VDUSE character devices: create and destroy through /dev/vduse/control, then one object per device.

Layouts and numbers: include/uapi/linux/vduse.h; behaviour: drivers/vdpa/vdpa_user/vduse_dev.c.
What this file keeps true: a device is opened by one process at a time (the kernel says EBUSY to a second),
and every EPERM from a device ioctl is reported as DeviceBroken, because that is what the kernel means by it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import struct
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from csi_vduse.dataplane import config_space
from csi_vduse.errors import (
    AlreadyExists,
    DeviceBroken,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unavailable,
    VduseError,
)

VDUSE_DIR = Path("/dev/vduse")
SYSFS_CLASS = Path("/sys/class/vduse")
VIRTIO_ID_NET = 1
VIRTIO_ID_BLOCK = 2
MAX_QUEUES = 64
MAX_QUEUE_SIZE = 1024
DEFAULT_QUEUE_SIZE = 256
SUPPORTED_API_VERSION = 1

_GET_API_VERSION = 0x80088100
_SET_API_VERSION = 0x40088101
_CREATE_DEV = 0x41508102
_DESTROY_DEV = 0x41008103
_IOTLB_GET_FD = 0xC0208110
_DEV_GET_FEATURES = 0x80088111
_DEV_SET_CONFIG = 0x40088112
_DEV_INJECT_CONFIG_IRQ = 0x00008113
_VQ_SETUP = 0x40208114
_VQ_GET_INFO = 0xC0308115
_VQ_SETUP_KICKFD = 0x40088116
VQ_INJECT_IRQ = 0x40048117

_DEV_CONFIG = struct.Struct("=256sIIQII II11I I")  # name .. vq_align, ngroups, nas, reserved, config_size
_IOTLB_ENTRY = struct.Struct("=QQQB7x")  # offset, start, last, perm
_VQ_CONFIG = struct.Struct("=IHxxI20x")  # index, max_size, group
_VQ_INFO = struct.Struct("=IIQQQHHHHB7x")  # index, num, desc, driver, device, state (4 x u16), ready
_DESTROY_RETRY_S = 0.05


@dataclass(frozen=True)
class DeviceSpec:
    """What a device shows to its driver; fixed at creation but for the capacity.

    is_network: it is a network card, without capacity; not a disk.
    shown: feature bits and configuration space of a server, in place of ours.
    """

    name: str
    capacity_bytes: int
    block_size_bytes: int = 512
    queues: int = 1
    queue_size: int = DEFAULT_QUEUE_SIZE
    read_only: bool = False
    discard: bool = True
    packed: bool = False
    is_network: bool = False
    shown: tuple[int, bytes] | None = None

    def __post_init__(self) -> None:
        """Refuse what the kernel or a driver would refuse later and less clearly."""
        if (
            not self.name
            or "/" in self.name
            or self.name in {".", "..", "control"}
            or len(self.name.encode()) > 255
        ):
            raise InvalidArgument(
                f"{self.name!r} cannot be a device name",
                hint="1 to 255 bytes, no '/', not '.', '..' or 'control'",
            )
        if not 1 <= self.queues <= MAX_QUEUES:
            raise InvalidArgument(f"{self.queues} queues", hint=f"use 1 to {MAX_QUEUES}")
        if not 4 <= self.queue_size <= MAX_QUEUE_SIZE or self.queue_size & (self.queue_size - 1):
            raise InvalidArgument(
                f"queue size {self.queue_size}", hint=f"use a power of two from 4 to {MAX_QUEUE_SIZE}"
            )
        if self.block_size_bytes not in config_space.BLOCK_SIZES:
            raise InvalidArgument(
                f"block size {self.block_size_bytes}", hint=f"use one of {config_space.BLOCK_SIZES}"
            )
        if self.is_network:
            return
        if self.capacity_bytes <= 0 or self.capacity_bytes % self.block_size_bytes:
            raise InvalidArgument(
                f"capacity of {self.capacity_bytes} bytes",
                hint=f"use a positive multiple of {self.block_size_bytes}",
            )

    @property
    def features(self) -> int:
        """Feature bits offered to the driver."""
        if self.shown:
            return self.shown[0]
        return config_space.features(
            queues=self.queues, read_only=self.read_only, discard=self.discard, packed=self.packed
        )

    def config(self) -> bytes:
        """Encode the virtio-blk configuration space."""
        if self.shown:
            return self.shown[1]
        return config_space.encode(
            capacity_bytes=self.capacity_bytes,
            block_size_bytes=self.block_size_bytes,
            queues=self.queues,
            queue_size=self.queue_size,
        )


def open_control() -> int:
    """Open /dev/vduse/control.

    Raises:
        FailedPrecondition: the vduse module is not loaded.
        PermissionDenied: not root, or the container lacks the device.
    """
    try:
        return os.open(VDUSE_DIR / "control", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError as error:
        raise FailedPrecondition(
            f"{VDUSE_DIR}/control does not exist",
            hint="load the kernel modules: modprobe -a vduse virtio_vdpa vhost_vdpa",
        ) from error
    except PermissionError as error:
        raise PermissionDenied(
            f"{VDUSE_DIR}/control cannot be opened: {error.strerror}",
            hint="run as root with the device in the container",
        ) from error


def negotiate_api_version(control_fd: int) -> int:
    """Select the newest API version that this kernel and we both know, for this open file; return it."""
    for version in range(SUPPORTED_API_VERSION, 0, -1):
        with contextlib.suppress(OSError):
            fcntl.ioctl(control_fd, _SET_API_VERSION, struct.pack("=Q", version))
            return version
    fcntl.ioctl(control_fd, _SET_API_VERSION, struct.pack("=Q", 0))
    return 0


def create_device(spec: DeviceSpec) -> None:
    """Create the device; it belongs to nobody until someone opens it, and outlives all processes.

    Raises:
        AlreadyExists: a device of that name exists.
        FailedPrecondition, PermissionDenied: see ``open_control``.
        VduseError: the kernel refused for another reason.
    """
    control = open_control()
    try:
        version = negotiate_api_version(control)
        groups = 1 if version else 0
        config = spec.config()
        request = _DEV_CONFIG.pack(
            spec.name.encode(),
            0,
            VIRTIO_ID_NET if spec.is_network else VIRTIO_ID_BLOCK,
            spec.features,
            spec.queues,
            4096,
            groups,
            groups,
            *[0] * 11,
            len(config),
        )
        try:
            fcntl.ioctl(control, _CREATE_DEV, request + config)
        except OSError as error:
            if error.errno == errno.EEXIST:
                raise AlreadyExists(
                    f"VDUSE device {spec.name!r} exists already",
                    hint="another program made it, or it was left behind",
                ) from error
            raise VduseError(f"creating VDUSE device {spec.name!r} failed: {error.strerror}") from error
    finally:
        os.close(control)


def destroy_device(name: str, *, timeout_s: float = 5.0) -> None:
    """Destroy the device; done already is fine.

    The kernel refuses with EBUSY while the device is on the vdpa bus or open, and both end a moment after
    the call that ends them returns, so EBUSY is retried until timeout_s.

    Raises:
        FailedPrecondition: still busy after timeout_s.
    """
    control = open_control()
    try:
        deadline = time.monotonic() + timeout_s
        while True:
            try:
                fcntl.ioctl(control, _DESTROY_DEV, struct.pack("=256s", name.encode()))
            except OSError as error:
                if error.errno == errno.EINVAL and not (SYSFS_CLASS / name).exists():
                    return
                if error.errno != errno.EBUSY:
                    raise VduseError(f"destroying VDUSE device {name!r} failed: {error.strerror}") from error
                if time.monotonic() > deadline:
                    raise FailedPrecondition(
                        f"VDUSE device {name!r} is still on the vdpa bus or open",
                        hint="remove it from the bus first",
                    ) from error
                time.sleep(_DESTROY_RETRY_S)
            else:
                return
    finally:
        os.close(control)


def open_device(name: str) -> int:
    """Open /dev/vduse/NAME, of which the kernel allows one opener at a time.

    Raises:
        Unavailable: another process has it open.
    """
    try:
        return os.open(VDUSE_DIR / name, os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise Unavailable(f"VDUSE device {name!r} is open in another process") from error
        raise VduseError(f"opening VDUSE device {name!r} failed: {error.strerror}") from error


def set_device_attribute(name: str, attribute: str, value: int) -> None:
    """Write a sysfs attribute of the device: msg_timeout (seconds) or bounce_size (bytes).

    bounce_size can be written only before the device is on the bus (drivers/vdpa/vdpa_user/vduse_dev.c).
    """
    path = SYSFS_CLASS / name / attribute
    try:
        path.write_text(f"{value}\n")
    except OSError as error:
        raise VduseError(f"writing {value} to {path} failed: {error.strerror}") from error


@dataclass(frozen=True)
class QueueInfo:
    """Where the driver has put a queue; addresses are IOVAs, both states (of either ring format) initial ones.

    packed_state: as in ``struct vd_queue_config``, decl/engine.h.
    """

    size: int
    desc_iova: int
    driver_iova: int
    device_iova: int
    avail_index: int
    packed_state: int
    ready: bool


@dataclass(frozen=True)
class IotlbEntry:
    """One mapped range of IOVAs and the file that backs it; the fd belongs to the holder."""

    fd: int
    offset: int
    start: int
    last: int
    writable: bool


class Device:
    """An open VDUSE device; owns the descriptor.

    Every method raises DeviceBroken once the kernel has given the device up.
    """

    def __init__(self, fd: int, name: str) -> None:
        self.fd = fd
        self.name = name

    def close(self) -> None:
        """Close the device; unanswered messages go back to the kernel's queue."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def setup_queue(self, index: int, max_size: int) -> None:
        """Tell the kernel the largest size of a queue: each queue's, before the device joins the bus."""
        self._ioctl(_VQ_SETUP, _VQ_CONFIG.pack(index, max_size, 0), f"setting up queue {index}")

    def features(self) -> int:
        """Return the feature bits that the driver accepted."""
        answer = self._ioctl(_DEV_GET_FEATURES, bytes(8), "reading the features")
        return int.from_bytes(answer, "little")

    def queue_info(self, index: int) -> QueueInfo:
        """Return where a queue is and whether the driver has enabled it."""
        answer = self._ioctl(_VQ_GET_INFO, _VQ_INFO.pack(index, *[0] * 9), f"reading queue {index}")
        _, size, desc, driver, device, *state, ready = _VQ_INFO.unpack(answer)
        avail_wrap, avail, used_wrap, used = state  # a split ring has its index in the first, and no more
        packed = avail & 0x7FFF | (avail_wrap & 1) << 15 | (used & 0x7FFF) << 16 | (used_wrap & 1) << 31
        return QueueInfo(size, desc, driver, device, state[0], packed, bool(ready))

    def set_kick_fd(self, index: int, fd: int) -> None:
        """Let kicks of a queue signal an eventfd; one that came earlier signals it now."""
        self._ioctl(
            _VQ_SETUP_KICKFD, struct.pack("=Ii", index, fd), f"setting the kick eventfd of queue {index}"
        )

    def inject_queue_interrupt(self, index: int) -> bool:
        """Interrupt the driver for a queue, False if none runs; the engine does this itself, this is for recovery."""
        try:
            fcntl.ioctl(self.fd, VQ_INJECT_IRQ, struct.pack("=I", index))
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            self._raise(error, f"interrupting queue {index}")
        return True

    def set_config(self, offset: int, data: bytes) -> None:
        """Write into the configuration space."""
        self._ioctl(
            _DEV_SET_CONFIG, struct.pack("=II", offset, len(data)) + data, "writing the configuration space"
        )

    def inject_config_interrupt(self) -> bool:
        """Tell the driver that the configuration space has changed; False if no driver runs."""
        try:
            fcntl.ioctl(self.fd, _DEV_INJECT_CONFIG_IRQ)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            self._raise(error, "raising a configuration interrupt")
        return True

    def iotlb_entries(self) -> list[IotlbEntry]:
        """Return all ranges mapped now, in the order of their addresses."""
        entries: list[IotlbEntry] = []
        start = 0
        while True:
            request = bytearray(_IOTLB_ENTRY.pack(0, start, (1 << 64) - 1, 0))
            try:
                fd = fcntl.ioctl(self.fd, _IOTLB_GET_FD, request)
            except OSError as error:
                if error.errno == errno.EINVAL:
                    return entries
                self._raise(error, "reading the address map")
            offset, first, last, perm = _IOTLB_ENTRY.unpack(bytes(request))
            entries.append(IotlbEntry(fd, offset, first, last, writable=bool(perm & 2)))
            if last >= (1 << 64) - 1:
                return entries
            start = last + 1

    def _ioctl(self, request: int, payload: bytes, what: str) -> bytes:
        try:
            return fcntl.ioctl(self.fd, request, payload)
        except OSError as error:
            self._raise(error, what)

    def _raise(self, error: OSError, what: str) -> NoReturn:
        if error.errno == errno.EPERM:
            raise DeviceBroken(
                f"{what} of VDUSE device {self.name!r}: the kernel has given the device up",
                hint="a control message went unanswered for msg_timeout; detach and attach again",
            ) from error
        raise VduseError(f"{what} of VDUSE device {self.name!r} failed: {error.strerror}") from error
