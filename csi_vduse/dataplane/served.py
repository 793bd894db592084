"""A VDUSE device being served: the kernel's control messages on one side, the engine's queues on the other.

Kept true:
- Every message is answered, and soon: whatever waits for a backend is bounded by DRAIN_TIMEOUT_S, well below
  the kernel's msg_timeout, because one unanswered message breaks the device for good.
- Queues run between an accepted DRIVER_OK and the next reset, and only then. DRIVER_OK is answered before
  they start: until then the kernel refuses their interrupts.
- The address map changes only while no queue fetches.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from csi_vduse import log
from csi_vduse.dataplane import config_space, messages
from csi_vduse.dataplane.device import VQ_INJECT_IRQ, Device, DeviceSpec, IotlbEntry
from csi_vduse.dataplane.engine import Engine, QueueAddress, Region, is_kernels_own
from csi_vduse.dataplane.inflight import InflightLog
from csi_vduse.dataplane.vhost_user.mediator import Mediator
from csi_vduse.dataplane.vhost_user.relay import Relay
from csi_vduse.errors import DeadlineExceeded, DeviceBroken, VduseError

DRAIN_TIMEOUT_S: Final = 5.0
_LEAST_DRAIN_S: Final = 0.1  # for an idle queue behind one that used the time up
# All memory of a virtio_vdpa device is one file of the kernel's, whose offsets are IOVAs: bounce pages, then rings.
# Mapping it whole costs address space only (drivers/vdpa/vdpa_user/iova_domain.c; VDUSE_IOVA_SIZE in vduse_dev.c).
_DOMAIN_BYTES: Final = (1 << 30) + (128 << 20)


class ServedDevice:
    """Serve a device from an engine; owns both.

    Args:
        device: open, not yet on the bus; its queues are set up here.
        engine: ready, without queues; or who serves them in its place.
        spec: what the device was created with.
        inflight: the device's log.
        resume: another worker served the device before and died; what it had in flight is replayed first.

    Raises:
        DataLoss: the log is not one of the driver that uses the device.
    """

    def __init__(
        self,
        device: Device,
        engine: Engine | Relay | Mediator,
        spec: DeviceSpec,
        inflight: InflightLog,
        *,
        resume: bool = False,
    ) -> None:
        self.device = device
        self.engine = engine
        self.broken = False
        self.status = 0
        self.features = 0
        self.capacity_bytes = spec.capacity_bytes
        self._spec = spec
        self._inflight = inflight
        self._log = log.get()
        self._kick_fds: dict[int, int] = {}
        self._started: set[int] = set()
        self._quiesced = False
        self._resumed = resume
        if resume:
            try:
                self._take_over()
            except VduseError:
                self._stop_queues()
                raise
            return
        for index in range(spec.queues):
            device.setup_queue(index, spec.queue_size)

    @property
    def _packed(self) -> bool:
        return bool(self.features & config_space.F_RING_PACKED)

    @property
    def waiting_kick_fds(self) -> dict[int, int]:
        """Kick eventfd → queue, of queues not enabled at DRIVER_OK: a kick means that they are now."""
        return {fd: index for index, fd in self._kick_fds.items() if index not in self._started}

    def handle_message(self) -> None:
        """Answer one control message if one has arrived; notice when the kernel gives the device up."""
        try:
            try:
                packet = os.read(self.device.fd, messages.MESSAGE_BYTES)
            except BlockingIOError:
                # A broken device polls as ready for ever and has nothing to read; its ioctls are refused.
                self.device.features()
                return
            self._handle(messages.decode(packet))
        except OSError as error:
            self._give_up(f"reading control messages: {error.strerror}")
        except DeviceBroken as error:
            self._give_up(str(error))

    def start_ready_queue(self, index: int) -> None:
        """Start a queue if the driver has enabled it by now."""
        info = self.device.queue_info(index)
        if not info.ready or index in self._started:
            return
        address = QueueAddress(
            features=self.features,
            size=info.size,
            desc_iova=info.desc_iova,
            driver_iova=info.driver_iova,
            device_iova=info.device_iova,
            state=info.packed_state if self._packed else info.avail_index,
            # A worker that died in its start has begun some of the queues only.
            resume=self._resumed and self._inflight.was_begun(index),
            kick_fd=self._kick_fds[index],
            notify_fd=self.device.fd,
            notify_ioctl=VQ_INJECT_IRQ,
            inflight=self._inflight.part(index),
            paused=self._quiesced,
        )
        self._started.add(index)
        try:
            self.engine.start_queue(index, address)
        except VduseError as error:
            self._log.error("a queue cannot be served", queue=index, error=str(error))

    def resize(self, capacity_bytes: int) -> None:
        """Publish a new capacity to the driver and raise the config interrupt.

        capacity_bytes: a multiple of 512; the backend has it already.

        Raises:
            FailedPrecondition: the backend is smaller.
            DeviceBroken: the kernel has given the device up.
        """
        self.engine.set_capacity(capacity_bytes)
        self.device.set_config(*config_space.encode_capacity(capacity_bytes))
        self.device.inject_config_interrupt()
        self.capacity_bytes = capacity_bytes

    def quiesce(self) -> None:
        """Stop taking requests; on return none is in flight.

        Raises:
            DeadlineExceeded: the backend did not finish in time; requests are taken again.
        """
        self._quiesced = True
        if not self._pause():
            self.resume()
            raise DeadlineExceeded(
                f"requests of volume {self._spec.name} were still in flight after {DRAIN_TIMEOUT_S:g} s",
                hint="the backend is slow or away; retry",
            )

    def resume(self) -> None:
        """Take requests again after a quiesce."""
        self._quiesced = False
        for index in self._started:
            self.engine.resume_queue(index)

    def describe(self) -> dict[str, Any]:
        """Counters and state, for the stats request of the control channel."""
        return {
            **self.engine.stats(),
            "features": self.features,
            "device_status": self.status,
            "capacity_bytes": self.capacity_bytes,
            "broken": self.broken,
            "waiting": self._waiting(),
            "faults": {str(queue): fault for queue, fault in self.engine.faults().items()},
        }

    def _waiting(self) -> str:
        """What requests wait for, in words; empty if none does."""
        if self.engine.abandoned_queues():
            return "all requests wait until the backend has ended what was abandoned at a reset"
        count, newest = self.engine.waiting(), self.engine.failure()
        if not count or newest is None:
            return ""
        return (
            f"{count} requests wait for the backend: the last {newest.operation} failed with {newest.error}"
        )

    def close(self) -> None:
        """Stop all queues and close the device; it stays on the bus until somebody removes it."""
        self._stop_queues()
        self.device.close()

    def _handle(self, request: messages.Request) -> None:
        match request:
            case messages.SetStatus(request_id, status):
                self._set_status(request_id, status)
            case messages.GetQueueState(request_id, index):
                state = self.engine.queue_state(index)
                self._answer(messages.encode_queue_state(request_id, index, state, packed=self._packed))
            case messages.UpdateIotlb(request_id):
                if self.status & messages.STATUS_DRIVER_OK:
                    self._remap_running()
                self._answer(messages.encode_answer(request_id))
            case messages.Other(request_id, kind):
                self._answer(messages.encode_answer(request_id, ok=kind == messages.SET_VQ_GROUP_ASID))

    def _take_over(self) -> None:
        """Start the queues that the dead worker served, and make up for lost kicks and interrupts."""
        if not any(self.device.queue_info(index).ready for index in range(self._spec.queues)):
            return
        if not self._inflight.features:
            # The driver that set these queues up has not been served yet: its DRIVER_OK is on its way to us.
            self._resumed = False
            return
        self.features = self.device.features()
        self._inflight.check(self.features)
        self.status = messages.STATUS_FEATURES_OK | messages.STATUS_DRIVER_OK
        self._start_queues()
        for index in self._started:
            self.device.inject_queue_interrupt(index)

    def _set_status(self, request_id: int, status: int) -> None:
        if status == 0:
            if not self._stop_queues() and not self.engine.fences:
                self._give_up("its server may still be at the driver's memory: the reset cannot be answered")
                return
            self._inflight.begin(0)
            self.status = self.features = 0
            self._resumed = False
            self._answer(messages.encode_answer(request_id))
            self._log.info("device reset")
            return
        if status & messages.STATUS_FEATURES_OK and not self.status & messages.STATUS_FEATURES_OK:
            self.features = self.device.features()
            if not self.features & config_space.F_VERSION_1:
                self._log.error("driver refused: it does not speak virtio 1", features=hex(self.features))
                self._answer(messages.encode_answer(request_id, ok=False))
                return
        started = bool(status & ~self.status & messages.STATUS_DRIVER_OK)
        if started:
            self._inflight.begin(self.features)  # before the answer: from then on a successor relies on it
        self.status = status
        self._answer(messages.encode_answer(request_id))
        if started:
            self._start_queues()

    def _answer(self, packet: bytes) -> None:
        try:
            os.write(self.device.fd, packet)
        except OSError as error:
            self._give_up(f"answering a control message: {error.strerror}")

    def _start_queues(self) -> None:
        with self.engine.at_once():
            self._map_memory()
            for index in range(self._spec.queues):
                self._kick_fds[index] = os.eventfd(0, os.EFD_CLOEXEC)
                self.device.set_kick_fd(index, self._kick_fds[index])
                self.start_ready_queue(index)
        self._log.info("driver ready", features=hex(self.features), queues=len(self._started))

    def _stop_queues(self) -> bool:
        """Stop all; False if requests had to be abandoned."""
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        drained = True
        for index in self._started:
            if not self.engine.stop_queue(index, max(_LEAST_DRAIN_S, deadline - time.monotonic())):
                drained = False
                self._log.error(
                    "requests abandoned: the backend did not finish them before the reset", queue=index
                )
        self._started.clear()
        for fd in self._kick_fds.values():
            os.close(fd)
        self._kick_fds.clear()
        self.engine.set_regions([])
        return drained

    def _pause(self) -> bool:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        drained = [
            self.engine.pause_queue(i, max(_LEAST_DRAIN_S, deadline - time.monotonic()))
            for i in self._started
        ]
        return all(drained)

    def _remap_running(self) -> None:
        if not self._pause():
            self._log.error("address map changed while requests were in flight; they end in the old one")
        self._map_memory()
        if not self._quiesced:
            self.resume()

    def _map_memory(self) -> None:
        with _entries(self.device) as entries:
            self.engine.set_regions(_regions(entries))

    def _give_up(self, reason: str) -> None:
        self.broken = True
        self._log.error(
            "the kernel has given the device up", reason=reason, hint="detach the volume and attach it again"
        )


@contextmanager
def _entries(device: Device) -> Iterator[list[IotlbEntry]]:
    entries = device.iotlb_entries()
    try:
        yield entries
    finally:
        for entry in entries:
            os.close(entry.fd)


def _regions(entries: list[IotlbEntry]) -> list[Region]:
    for entry in entries:
        if is_kernels_own(entry.fd):
            return [Region(0, _DOMAIN_BYTES, 0, entry.fd, writable=True)]
    return [Region(e.start, e.last - e.start + 1, e.offset, e.fd, e.writable) for e in entries]
