"""The agent's gRPC service over a unix socket: decode, ask the agent, encode; errors in one place."""

# ruff: noqa: N802 - gRPC names its methods

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import grpc
import structlog

from csi_vduse import __version__, log
from csi_vduse.agent import wire
from csi_vduse.agent.agent import Agent
from csi_vduse.config import check_socket_path
from csi_vduse.errors import FailedPrecondition, VduseError
from csi_vduse.proto import agent_pb2, agent_pb2_grpc

T = TypeVar("T")
Context = grpc.aio.ServicerContext[Any, Any]

_SOCKET_UMASK = 0o177  # the socket is for root alone: who may connect may attach any file of the node


class AgentServicer(agent_pb2_grpc.AgentServicer):
    """agent.proto over an Agent."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def Attach(self, request: agent_pb2.AttachRequest, context: Context) -> agent_pb2.Attachment:
        """See agent.proto."""

        async def act() -> agent_pb2.Attachment:
            return wire.attachment_to_wire(await self._agent.attach(wire.spec_from_wire(request)))

        return await _answer("Attach", request.volume_id, context, act)

    async def Detach(self, request: agent_pb2.DetachRequest, context: Context) -> agent_pb2.DetachResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.DetachResponse:
            await self._agent.detach(request.volume_id, force=request.force)
            return agent_pb2.DetachResponse()

        return await _answer("Detach", request.volume_id, context, act)

    async def Resize(self, request: agent_pb2.ResizeRequest, context: Context) -> agent_pb2.Attachment:
        """See agent.proto."""

        async def act() -> agent_pb2.Attachment:
            attachment = await self._agent.resize(request.volume_id, request.capacity_bytes)
            return wire.attachment_to_wire(attachment)

        return await _answer("Resize", request.volume_id, context, act)

    async def SetThrottle(
        self, request: agent_pb2.SetThrottleRequest, context: Context
    ) -> agent_pb2.Attachment:
        """See agent.proto."""

        async def act() -> agent_pb2.Attachment:
            throttle = wire.throttle_from_wire(request.throttle)
            return wire.attachment_to_wire(await self._agent.throttle(request.volume_id, throttle))

        return await _answer("SetThrottle", request.volume_id, context, act)

    async def List(self, request: agent_pb2.ListRequest, context: Context) -> agent_pb2.ListResponse:
        """See agent.proto."""
        del request

        async def act() -> agent_pb2.ListResponse:
            found = self._agent.attachments()
            return agent_pb2.ListResponse(attachments=[wire.attachment_to_wire(each) for each in found])

        return await _answer("List", "", context, act)

    async def Inspect(self, request: agent_pb2.InspectRequest, context: Context) -> agent_pb2.InspectResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.InspectResponse:
            inspection = await self._agent.inspect(request.volume_id)
            return agent_pb2.InspectResponse(
                attachment=wire.attachment_to_wire(inspection.attachment),
                stats=wire.stats_to_wire(inspection.stats) if inspection.stats is not None else None,
                features=inspection.features,
                device_status=inspection.device_status,
            )

        return await _answer("Inspect", request.volume_id, context, act)

    async def Quiesce(self, request: agent_pb2.QuiesceRequest, context: Context) -> agent_pb2.QuiesceResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.QuiesceResponse:
            await self._agent.quiesce(request.volume_id, request.hold_s)
            return agent_pb2.QuiesceResponse()

        return await _answer("Quiesce", request.volume_id, context, act)

    async def Resume(self, request: agent_pb2.ResumeRequest, context: Context) -> agent_pb2.ResumeResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.ResumeResponse:
            await self._agent.resume(request.volume_id)
            return agent_pb2.ResumeResponse()

        return await _answer("Resume", request.volume_id, context, act)

    async def Handover(
        self, request: agent_pb2.HandoverRequest, context: Context
    ) -> agent_pb2.HandoverResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.HandoverResponse:
            done = await self._agent.handover(request.volume_id)
            return agent_pb2.HandoverResponse(
                attachment=wire.attachment_to_wire(done.attachment), pause_s=done.pause_s
            )

        return await _answer("Handover", request.volume_id, context, act)

    async def Leave(self, request: agent_pb2.LeaveRequest, context: Context) -> agent_pb2.LeaveResponse:
        """See agent.proto."""
        del request

        async def act() -> agent_pb2.LeaveResponse:
            await self._agent.leave()
            return agent_pb2.LeaveResponse(version=__version__)

        return await _answer("Leave", "", context, act)

    async def Shutdown(
        self, request: agent_pb2.ShutdownRequest, context: Context
    ) -> agent_pb2.ShutdownResponse:
        """See agent.proto."""

        async def act() -> agent_pb2.ShutdownResponse:
            kept = await self._agent.shut_down(request.timeout_s)
            outcomes = [
                agent_pb2.ShutdownOutcome(volume_id=volume_id, kept=why) for volume_id, why in kept.items()
            ]
            return agent_pb2.ShutdownResponse(volumes=outcomes)

        return await _answer("Shutdown", "", context, act)

    async def GetStats(
        self, request: agent_pb2.GetStatsRequest, context: Context
    ) -> agent_pb2.GetStatsResponse:
        """See agent.proto."""
        del request

        async def act() -> agent_pb2.GetStatsResponse:
            found = await self._agent.stats()
            return agent_pb2.GetStatsResponse(volumes=[wire.stats_to_wire(each) for each in found])

        return await _answer("GetStats", "", context, act)

    async def Probe(self, request: agent_pb2.ProbeRequest, context: Context) -> agent_pb2.ProbeResponse:
        """See agent.proto."""
        del request

        async def act() -> agent_pb2.ProbeResponse:
            probe = self._agent.probe()
            return agent_pb2.ProbeResponse(
                version=probe.version,
                ready=probe.ready,
                problems=probe.problems,
                max_volumes=probe.max_volumes,
            )

        return await _answer("Probe", "", context, act)


async def start_server(agent: Agent, socket_path: Path) -> grpc.aio.Server:
    """Serve the agent at `socket_path`; the caller stops the server.

    Raises:
        FailedPrecondition: another process listens there.
    """
    claim_socket(socket_path)
    server = grpc.aio.server()
    agent_pb2_grpc.add_AgentServicer_to_server(AgentServicer(agent), server)
    before = os.umask(_SOCKET_UMASK)
    try:
        server.add_insecure_port(f"unix:{socket_path}")
        await server.start()
    finally:
        os.umask(before)
    return server


def claim_socket(path: Path) -> None:
    """Remove a socket that nobody listens on any more, so that the path can be bound.

    Raises:
        FailedPrecondition: somebody listens there, or the path is not a socket.
        InvalidArgument: the path is too long.
    """
    check_socket_path(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_socket():
        raise FailedPrecondition(
            f"{path} exists and is not a socket", hint="remove it, or choose another directory"
        )
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(str(path))
        except ConnectionRefusedError:
            path.unlink()
            return
        except OSError as error:
            raise FailedPrecondition(f"{path} cannot be tried: {error.strerror}") from error
    raise FailedPrecondition(
        f"another process listens on {path}", hint="stop it, or choose another run directory"
    )


async def _answer(rpc: str, volume_id: str, context: Context, act: Callable[[], Awaitable[T]]) -> T:
    with structlog.contextvars.bound_contextvars(
        rpc=f"Agent/{rpc}", **({"volume_id": volume_id} if volume_id else {})
    ):
        try:
            return await act()
        except VduseError as error:
            log.get().warning("call failed", error=str(error), code=error.grpc_code)
            await _abort(context, error)
        except OSError as error:
            log.get().exception("call failed")
            await _abort(context, VduseError(f"{type(error).__name__}: {error}"))


async def _abort(context: Context, error: VduseError) -> NoReturn:
    code, message, metadata = wire.error_status(error)
    await context.abort(code, message, metadata)
