"""VDUSE devices as the agent handles them: made, tuned, opened, destroyed; never blocks the event loop."""

from __future__ import annotations

import functools
from typing import Protocol

from csi_vduse.agent.bounded import bounded
from csi_vduse.dataplane import device
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import uring_problem

_IOCTL_GRACE_S = 5.0


class Kernel(Protocol):
    """The part of the kernel that attach and detach act on; the tests' one refuses what the kernel does."""

    async def create(self, spec: DeviceSpec) -> None:
        """Create a device; AlreadyExists if the name is taken."""

    async def destroy(self, name: str) -> None:
        """Destroy a device, waiting for its last user to let go; fine if there is none."""

    def problem(self) -> str:
        """Say what keeps every worker from serving, and what to do; empty if nothing does."""

    def open(self, name: str) -> int:
        """Open a device: one opener at a time, Unavailable to a second."""

    def set_attribute(self, name: str, attribute: str, value: int) -> None:
        """Set msg_timeout (seconds) or bounce_size (bytes)."""


class VduseKernel:
    """The real one."""

    def __init__(self, *, destroy_timeout_s: float) -> None:
        self._destroy_timeout_s = destroy_timeout_s

    async def create(self, spec: DeviceSpec) -> None:
        """See Kernel."""
        device.create_device(spec)

    async def destroy(self, name: str) -> None:
        """See Kernel. In a thread: it retries while the kernel is still letting go of the device."""
        await bounded(
            f"destroying VDUSE device {name}",
            functools.partial(device.destroy_device, name, timeout_s=self._destroy_timeout_s),
            timeout_s=self._destroy_timeout_s + _IOCTL_GRACE_S,
            undo=lambda _: None,
        )

    def problem(self) -> str:
        """See Kernel."""
        return uring_problem()

    def open(self, name: str) -> int:
        """See Kernel."""
        return device.open_device(name)

    def set_attribute(self, name: str, attribute: str, value: int) -> None:
        """See Kernel."""
        device.set_device_attribute(name, attribute, value)
