"""How the rest of the driver talks to the agent: values in, values out, the agent's errors raised again."""

from __future__ import annotations

from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import grpc

from csi_vduse.agent import wire
from csi_vduse.agent.model import Attachment, AttachSpec, Handover, Inspection, Probe, VolumeStats
from csi_vduse.dataplane.throttle import Throttle
from csi_vduse.errors import Unavailable, VduseError
from csi_vduse.proto import agent_pb2, agent_pb2_grpc

T = TypeVar("T")

# Longer than the steps of the agent's own deadlines together: the agent says better what hung.
_ACT_TIMEOUT_S = 300.0
_ASK_TIMEOUT_S = 30.0


class AgentClient:
    """A connection to the agent of this node, made when first used and again whenever it is lost.

    Every method raises what the agent raised, or Unavailable if no agent answers.

    Args:
        socket_path: the agent's socket.
    """

    def __init__(self, socket_path: Path) -> None:
        self._socket_path = socket_path
        self._channel: grpc.aio.Channel | None = None
        self._stub_: agent_pb2_grpc.AgentAsyncStub | None = None

    async def close(self) -> None:
        """Close the connection."""
        if self._channel is not None:
            await self._channel.close()
            self._channel = None
            self._stub_ = None

    async def attach(self, spec: AttachSpec) -> Attachment:
        """Attach a volume; the same again returns the same."""
        answer = await self._call(self._stub.Attach(wire.spec_to_wire(spec), timeout=_ACT_TIMEOUT_S))
        return wire.attachment_from_wire(answer)

    async def detach(self, volume_id: str, *, force: bool = False) -> None:
        """Detach a volume; fine if it is not attached. FailedPrecondition while it is in use, but by force."""
        request = agent_pb2.DetachRequest(volume_id=volume_id, force=force)
        await self._call(self._stub.Detach(request, timeout=_ACT_TIMEOUT_S))

    async def resize(self, volume_id: str, capacity_bytes: int) -> Attachment:
        """Tell the driver about a capacity that the backend has already."""
        request = agent_pb2.ResizeRequest(volume_id=volume_id, capacity_bytes=capacity_bytes)
        return wire.attachment_from_wire(await self._call(self._stub.Resize(request, timeout=_ACT_TIMEOUT_S)))

    async def throttle(self, volume_id: str, throttle: Throttle) -> Attachment:
        """Change how fast a volume may be; NotFound if it is not attached."""
        request = agent_pb2.SetThrottleRequest(volume_id=volume_id, throttle=wire.throttle_to_wire(throttle))
        answer = await self._call(self._stub.SetThrottle(request, timeout=_ASK_TIMEOUT_S))
        return wire.attachment_from_wire(answer)

    async def list(self) -> list[Attachment]:
        """Return every attachment of the node."""
        answer = await self._call(self._stub.List(agent_pb2.ListRequest(), timeout=_ASK_TIMEOUT_S))
        return [wire.attachment_from_wire(each) for each in answer.attachments]

    async def inspect(self, volume_id: str) -> Inspection:
        """Return one attachment in full; NotFound if it is not attached."""
        request = agent_pb2.InspectRequest(volume_id=volume_id)
        answer = await self._call(self._stub.Inspect(request, timeout=_ASK_TIMEOUT_S))
        return Inspection(
            attachment=wire.attachment_from_wire(answer.attachment),
            stats=wire.stats_from_wire(answer.stats) if answer.HasField("stats") else None,
            features=answer.features,
            device_status=answer.device_status,
        )

    async def quiesce(self, volume_id: str, hold_s: float) -> None:
        """Hold requests for at most hold_s, so that the image is a consistent cut; fine if not attached."""
        request = agent_pb2.QuiesceRequest(volume_id=volume_id, hold_s=hold_s)
        await self._call(self._stub.Quiesce(request, timeout=_ASK_TIMEOUT_S))

    async def resume(self, volume_id: str) -> None:
        """Take requests again; fine if not attached."""
        request = agent_pb2.ResumeRequest(volume_id=volume_id)
        await self._call(self._stub.Resume(request, timeout=_ASK_TIMEOUT_S))

    async def handover(self, volume_id: str) -> Handover:
        """Replace the worker of a volume by a new one; the old one goes on if that fails."""
        request = agent_pb2.HandoverRequest(volume_id=volume_id)
        answer = await self._call(self._stub.Handover(request, timeout=_ACT_TIMEOUT_S))
        return Handover(wire.attachment_from_wire(answer.attachment), answer.pause_s)

    async def leave(self) -> str:
        """Have the agent end its operations and leave, for another to take its place; return its version."""
        answer = await self._call(self._stub.Leave(agent_pb2.LeaveRequest(), timeout=_ACT_TIMEOUT_S))
        return answer.version

    async def shutdown(self, timeout_s: float) -> dict[str, str]:
        """Prepare for the node's shutdown; return why each volume is still attached, empty if it is not."""
        request = agent_pb2.ShutdownRequest(timeout_s=timeout_s)
        answer = await self._call(self._stub.Shutdown(request, timeout=timeout_s + _ASK_TIMEOUT_S))
        return {each.volume_id: each.kept for each in answer.volumes}

    async def stats(self) -> list[VolumeStats]:  # type: ignore[valid-type]  # `list` is a method here
        """Return the counters of all workers."""
        answer = await self._call(self._stub.GetStats(agent_pb2.GetStatsRequest(), timeout=_ASK_TIMEOUT_S))
        return [wire.stats_from_wire(each) for each in answer.volumes]

    async def probe(self) -> Probe:
        """Return whether the agent can work."""
        answer = await self._call(self._stub.Probe(agent_pb2.ProbeRequest(), timeout=_ASK_TIMEOUT_S))
        return Probe(answer.version, answer.ready, tuple(answer.problems), answer.max_volumes)

    @property
    def _stub(self) -> agent_pb2_grpc.AgentAsyncStub:
        if self._stub_ is None:
            # Two sockets of one path are two agents to us: no sharing of connections between clients.
            options = (("grpc.use_local_subchannel_pool", 1),)
            self._channel = grpc.aio.insecure_channel(f"unix:{self._socket_path}", options=options)
            self._stub_ = agent_pb2_grpc.AgentStub(self._channel)
        return self._stub_

    async def _call(self, call: Awaitable[T]) -> T:
        try:
            return await call
        except grpc.aio.AioRpcError as error:
            raise self._translate(error) from error

    def _translate(self, error: grpc.aio.AioRpcError) -> VduseError:
        ours = wire.error_from_rpc(error)
        spoken = any(key == wire.ERROR_KEY for key, _ in error.trailing_metadata() or ())
        if error.code() is grpc.StatusCode.UNAVAILABLE and not spoken:
            return Unavailable(
                f"no agent answers on {self._socket_path}",
                hint="start `csi-vduse agent` or `csi-vduse standalone`, or name its --run-dir",
            )
        return ours
