"""What a front-end's messages do, from its connection to its disconnection.

Kept true:
- A message does what it says or nothing. One that cannot be carried out is answered with 1 if the front-end asked
  for an answer (REPLY_ACK), and ends the connection if not: a front-end must never take refused for done.
- The address map changes only while no queue fetches, and queues go on afterwards where they were.
- A front-end that is told that a queue has stopped may use its memory for something else: what the queue had to
  abandon cannot reach that memory any more (decl/engine.h, vd_queue_stop), unless another queue hangs as well.
- Nothing of a session outlives it: queues, memory and descriptors are gone when close returns.
"""

from __future__ import annotations

import os
import socket
import stat
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from csi_vduse import log
from csi_vduse.dataplane import config_space
from csi_vduse.dataplane.backend_log import tell_fault
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.dataplane.engine import Engine
from csi_vduse.dataplane.vhost_user import protocol
from csi_vduse.dataplane.vhost_user.connection import Connection, Message, send
from csi_vduse.dataplane.vhost_user.inflight import InflightLog, create
from csi_vduse.dataplane.vhost_user.memory import MappedRegion, MemoryTable
from csi_vduse.dataplane.vhost_user.protocol import ProtocolFeature, Request
from csi_vduse.dataplane.vhost_user.ring import Ring
from csi_vduse.errors import ProtocolError, Unavailable, VduseError

DRAIN_TIMEOUT_S: Final = 5.0
_LEAST_DRAIN_S: Final = 0.1  # for an idle queue behind one that used the time up
_FEATURES: Final = int(
    ProtocolFeature.MQ
    | ProtocolFeature.REPLY_ACK
    | ProtocolFeature.BACKEND_REQ
    | ProtocolFeature.CONFIG
    | ProtocolFeature.INFLIGHT_SHMFD
    | ProtocolFeature.RESET_DEVICE
    | ProtocolFeature.CONFIGURE_MEM_SLOTS
)


@dataclass(frozen=True)
class _ReplyWithFd:
    payload: bytes
    fd: int  # closed when it has been sent


class Session:
    """One front-end and what it has set up; owns the connection, uses the engine alone.

    Args:
        connection: accepted, nothing received yet.
        engine: ready, without queues and regions.
        spec: what the disk shows.
        memory_slots: regions that may be added; each costs descriptors.
    """

    def __init__(
        self, connection: Connection, engine: Engine, spec: DeviceSpec, *, memory_slots: int
    ) -> None:
        self.connection = connection
        self._engine = engine
        self._spec = spec
        self._memory_slots = memory_slots
        self._log = log.get()
        self._features = 0
        self._protocol_features = ProtocolFeature(0)
        self._memory = MemoryTable()
        self._log_file: InflightLog | None = None
        self._backend: socket.socket | None = None
        self._rings = [Ring(index, engine) for index in range(spec.queues)]
        self._handlers: dict[Request, Callable[..., bytes | _ReplyWithFd | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._ignore,
            Request.RESET_OWNER: self._ignore,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.SET_BACKEND_REQ_FD: self._set_backend_req_fd,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
            Request.GET_INFLIGHT_FD: self._get_inflight_fd,
            Request.SET_INFLIGHT_FD: self._set_inflight_fd,
            Request.RESET_DEVICE: self._reset_device,
            Request.GET_MAX_MEM_SLOTS: self._get_max_mem_slots,
            Request.ADD_MEM_REG: self._add_mem_reg,
            Request.REM_MEM_REG: self._rem_mem_reg,
        }

    def handle_input(self) -> None:
        """Take in what the front-end sent, and do one message if it is complete.

        Raises:
            Unavailable: the front-end is gone.
            ProtocolError: the connection has to end; close the session.
        """
        message = self.connection.receive()
        if message is None:
            return
        try:
            reply = self._perform(message)
        except (VduseError, OSError) as error:
            self._refuse(message, error)
            return
        finally:
            message.close()
        if isinstance(reply, _ReplyWithFd):
            try:
                answer = protocol.encode_reply(message.header.request, reply.payload)
                self.connection.send(answer, [reply.fd])
            finally:
                os.close(reply.fd)
        elif reply is not None:
            self.connection.send(protocol.encode_reply(message.header.request, reply))
        elif self._wants_answer(message):
            self._acknowledge(message, 0)

    def resized(self, spec: DeviceSpec) -> None:
        """Show another capacity, and tell the front-end if it can be told."""
        self._spec = spec
        if self._backend is None or not self._protocol_features & ProtocolFeature.CONFIG:
            return
        try:
            send(self._backend, protocol.encode_request(protocol.BackendRequest.CONFIG_CHANGE))
        except Unavailable as error:
            self._log.warning("the front-end was not told of the new capacity", error=str(error))

    def report_faults(self, faults: dict[int, str]) -> None:
        """Tell the log and the front-end, once each, which queues have stopped until they are set up again."""
        for index, fault in faults.items():
            ring = self._rings[index]
            if ring.running and not ring.fault_reported:
                ring.fault_reported = True
                ring.signal_error()
                tell_fault(index, fault)

    def close(self) -> None:
        """Stop the queues, let go of the front-end's memory, end the connection."""
        if not self._each(self._rings, Ring.close):
            self._log.error("requests abandoned: the backend did not finish them in time")
        self._log_file = None
        self._engine.set_regions([])
        self._memory.close()
        if self._backend is not None:
            self._backend.close()
        self.connection.close()

    def _perform(self, message: Message) -> bytes | _ReplyWithFd | None:
        payload = message.decode()
        request = Request(message.header.request)
        handler = self._handlers.get(request)
        if handler is None:
            raise ProtocolError(f"{request.name} belongs to nothing that was offered")
        self._log.debug("message", request=request.name, payload=payload)
        return handler(payload, message)

    def _refuse(self, message: Message, error: VduseError | OSError) -> None:
        if not self._wants_answer(message):
            raise ProtocolError(f"{message.header.name} refused: {error}") from error
        self._log.error("message refused", request=message.header.name, error=str(error))
        self._acknowledge(message, 1)

    def _wants_answer(self, message: Message) -> bool:
        return message.header.needs_reply and bool(self._protocol_features & ProtocolFeature.REPLY_ACK)

    def _acknowledge(self, message: Message, result: int) -> None:
        self.connection.send(protocol.encode_reply(message.header.request, protocol.encode_number(result)))

    # Features and configuration

    @property
    def _offered(self) -> int:
        # Ring addresses are user addresses and descriptors are guest addresses: there is no IOMMU in between.
        offered = self._spec.features | config_space.F_RING_PACKED | protocol.F_PROTOCOL_FEATURES
        return offered & ~config_space.F_ACCESS_PLATFORM

    def _ignore(self, _: protocol.Empty, __: Message) -> None:
        """SET_OWNER says nothing that the connection does not, RESET_OWNER is to be ignored."""

    def _get_features(self, _: protocol.Empty, __: Message) -> bytes:
        return protocol.encode_number(self._offered)

    def _set_features(self, features: protocol.Number, _: Message) -> None:
        if features.value & ~self._offered:
            raise ProtocolError(f"features {features.value & ~self._offered:#x} were not offered")
        self._features = features.value

    def _get_protocol_features(self, _: protocol.Empty, __: Message) -> bytes:
        return protocol.encode_number(_FEATURES)

    def _set_protocol_features(self, features: protocol.Number, _: Message) -> None:
        if features.value & ~_FEATURES:
            raise ProtocolError(f"protocol features {features.value & ~_FEATURES:#x} were not offered")
        self._protocol_features = ProtocolFeature(features.value)

    def _get_queue_num(self, _: protocol.Empty, __: Message) -> bytes:
        return protocol.encode_number(self._spec.queues)

    def _get_config(self, access: protocol.ConfigAccess, _: Message) -> bytes:
        config = self._spec.config().ljust(protocol.MAX_CONFIG_BYTES, b"\0")
        return protocol.encode_config(access, config[access.offset : access.offset + access.size_bytes])

    def _set_config(self, access: protocol.ConfigAccess, _: Message) -> None:
        raise ProtocolError(f"byte {access.offset} of the configuration space cannot be written")

    def _set_backend_req_fd(self, _: protocol.Empty, message: Message) -> None:
        if not stat.S_ISSOCK(os.fstat(message.fds[0]).st_mode):
            raise ProtocolError("the channel for requests of ours is no socket")
        if self._backend is not None:
            self._backend.close()
        self._backend = socket.socket(fileno=message.take_fd())

    # Memory

    def _get_max_mem_slots(self, _: protocol.Empty, __: Message) -> bytes:
        return protocol.encode_number(self._memory_slots)

    def _set_mem_table(self, table: protocol.MemoryTable, message: Message) -> None:
        regions = [MappedRegion(region, fd) for region, fd in zip(table.regions, message.fds, strict=True)]
        self._remap(self._memory.replaced(regions))
        message.fds.clear()  # they belong to the table now

    def _add_mem_reg(self, region: protocol.MemoryRegion, message: Message) -> None:
        if len(self._memory.regions) >= self._memory_slots:
            raise ProtocolError(f"more than {self._memory_slots} memory regions")
        self._remap(self._memory.added(MappedRegion(region, message.fds[0])))
        message.fds.clear()

    def _rem_mem_reg(self, region: protocol.MemoryRegion, _: Message) -> None:
        self._remap(self._memory.without(self._memory.find(region)))

    def _remap(self, memory: MemoryTable) -> None:
        """Give the engine another address map, which owns its descriptors if this succeeds."""
        running = [ring for ring in self._rings if ring.running]
        paused = self._each(running, Ring.pause)
        if not paused:
            self._log.error("memory changed while requests were in flight; they end in the old one")
        try:
            self._engine.set_regions(memory.engine_regions())
        except VduseError:
            for ring in running:
                ring.resume(self._memory)
            raise
        self._memory.close(keep=memory)
        self._memory = memory
        if paused:
            for ring in self._rings:
                ring.abandoned = False
        for ring in running:
            self._move(ring)
        if any(ring.abandoned and not ring.running for ring in running):
            self._take_memory_away()  # from rings that are not where they were
        for ring in self._rings:
            self._move_waiting(ring)

    def _take_memory_away(self) -> None:
        """Keep what a ring had to abandon out of the front-end's memory, before it is told that the ring has stopped."""
        abandoned = [ring.index for ring in self._rings if ring.abandoned]
        if not abandoned:
            return
        self._log.error("requests abandoned: the backend did not finish them in time", queues=abandoned)
        self._remap(self._memory)

    def _move(self, ring: Ring) -> None:
        try:
            ring.resume(self._memory)
        except ProtocolError as error:
            # A front-end that changes its memory piece by piece may take a piece away that it adds again.
            self._log.warning("a queue waits for its memory", queue=ring.index, error=str(error))

    def _move_waiting(self, ring: Ring) -> None:
        try:
            self._begin(ring)
        except VduseError as error:
            self._log.warning("a queue cannot be served", queue=ring.index, error=str(error))

    # The in-flight log

    @property
    def _packed(self) -> bool:
        return bool(self._features & config_space.F_RING_PACKED)

    def _get_inflight_fd(self, asked: protocol.Inflight, _: Message) -> _ReplyWithFd:
        fd, made = create(asked, packed=self._packed, max_queues=self._spec.queues)
        try:
            self._use_log(fd, made)
        except VduseError:
            os.close(fd)
            raise
        return _ReplyWithFd(protocol.encode_inflight(made), fd)

    def _set_inflight_fd(self, inflight: protocol.Inflight, message: Message) -> None:
        self._use_log(message.fds[0], inflight)

    def _use_log(self, fd: int, inflight: protocol.Inflight) -> None:
        """Let the rings that start from now on use a log; QEMU gives the one that it was given back at each start."""
        log_file = InflightLog(fd, inflight, packed=self._packed, max_queues=self._spec.queues)
        if self._log_file is None or not self._log_file.is_same(log_file):
            self._log_file = log_file
            for ring in self._rings:
                ring.set_log(log_file)

    # Queues

    def _ring(self, index: int) -> Ring:
        if index >= len(self._rings):
            raise ProtocolError(f"queue {index} of {len(self._rings)}")
        return self._rings[index]

    def _start(self, ring: Ring) -> None:
        """Start a ring if it is complete, after a change of it that may have stopped it."""
        self._take_memory_away()
        self._begin(ring)

    def _begin(self, ring: Ring) -> None:
        by_default = not self._features & protocol.F_PROTOCOL_FEATURES
        features = self._features & ~protocol.F_PROTOCOL_FEATURES
        try:
            started = ring.start_if_ready(features, self._memory, enabled_by_default=by_default)
        except VduseError:
            ring.signal_error()
            raise
        if started:
            self._log.info(
                "queue started",
                queue=ring.index,
                features=hex(features),
                served_again=ring.served_again,
            )

    def _set_vring_num(self, state: protocol.VringState, _: Message) -> None:
        ring = self._ring(state.index)
        ring.set_size(state.number)
        self._start(ring)

    def _set_vring_addr(self, address: protocol.VringAddress, _: Message) -> None:
        ring = self._ring(address.index)
        ring.set_address(address)
        self._start(ring)

    def _set_vring_base(self, state: protocol.VringState, _: Message) -> None:
        ring = self._ring(state.index)
        ring.set_base(state.number, packed=self._packed)
        self._start(ring)

    def _get_vring_base(self, state: protocol.VringState, _: Message) -> bytes:
        base, _drained = self._ring(state.index).stop(DRAIN_TIMEOUT_S)
        self._take_memory_away()
        self._log.info("queue stopped", queue=state.index, base=base)
        return protocol.encode_vring_state(state.index, base)

    def _set_vring_kick(self, which: protocol.VringFd, message: Message) -> None:
        ring = self._ring(which.index)
        if not which.has_fd:
            raise ProtocolError(f"queue {which.index} has no kick: a ring is not polled")
        ring.set_kick(message.fds[0])
        message.take_fd()
        self._start(ring)

    def _set_vring_call(self, which: protocol.VringFd, message: Message) -> None:
        self._ring(which.index).set_call(message.fds[0] if which.has_fd else None)
        message.fds.clear()

    def _set_vring_err(self, which: protocol.VringFd, message: Message) -> None:
        self._ring(which.index).set_error(message.fds[0] if which.has_fd else None)
        message.fds.clear()

    def _set_vring_enable(self, state: protocol.VringState, _: Message) -> None:
        ring = self._ring(state.index)
        if state.number > 1:
            raise ProtocolError(f"queue {state.index} enabled with {state.number}")
        if not ring.set_enabled(bool(state.number), DRAIN_TIMEOUT_S):
            self._log.error("requests are still in flight in a queue that was disabled", queue=state.index)
        self._start(ring)

    def _reset_device(self, _: protocol.Empty, __: Message) -> None:
        self._features = 0
        self._log_file = None
        self._each(self._rings, Ring.reset)
        self._take_memory_away()

    def _each(self, rings: list[Ring], act: Callable[[Ring, float], bool]) -> bool:
        deadline = time.monotonic() + DRAIN_TIMEOUT_S
        done = [act(ring, max(_LEAST_DRAIN_S, deadline - time.monotonic())) for ring in rings]
        return all(done)
