"""CSI Identity: who we are, what we can do, whether we are up."""
# ruff: noqa: N802, ARG002, ANN401 - names and signatures are gRPC's

from __future__ import annotations

from typing import Any, Protocol

from csi_vduse import DRIVER_NAME, __version__, log
from csi_vduse.agent.model import Probe
from csi_vduse.errors import VduseError
from csi_vduse.proto import csi_pb2, csi_pb2_grpc

_Service = csi_pb2.PluginCapability.Service
_Expansion = csi_pb2.PluginCapability.VolumeExpansion


class Prober(Protocol):
    """Knows whether we can work: the agent, or what the controller knows of the cluster."""

    async def probe(self) -> Probe:
        """Tell whether we can work, and if not why; may raise Unavailable."""
        ...


class Identity(csi_pb2_grpc.IdentityServicer):
    """The service.

    Args:
        prober: asked whether we can work.
        driver_name: what the orchestrator knows us by; never changes once volumes exist.
    """

    def __init__(self, prober: Prober, *, driver_name: str = DRIVER_NAME) -> None:
        self._prober = prober
        self._driver_name = driver_name

    async def GetPluginInfo(
        self, request: csi_pb2.GetPluginInfoRequest, context: Any
    ) -> csi_pb2.GetPluginInfoResponse:
        """Return name and version."""
        return csi_pb2.GetPluginInfoResponse(name=self._driver_name, vendor_version=__version__)

    async def GetPluginCapabilities(
        self,
        request: csi_pb2.GetPluginCapabilitiesRequest,
        context: Any,
    ) -> csi_pb2.GetPluginCapabilitiesResponse:
        """Return that there is a controller, that topology matters, and that volumes grow online."""
        return csi_pb2.GetPluginCapabilitiesResponse(
            capabilities=[
                csi_pb2.PluginCapability(service=_Service(type=_Service.CONTROLLER_SERVICE)),
                csi_pb2.PluginCapability(service=_Service(type=_Service.VOLUME_ACCESSIBILITY_CONSTRAINTS)),
                csi_pb2.PluginCapability(volume_expansion=_Expansion(type=_Expansion.ONLINE)),
            ]
        )

    async def Probe(self, request: csi_pb2.ProbeRequest, context: Any) -> csi_pb2.ProbeResponse:
        """Return whether we are ready; an agent that does not answer is starting, not an error."""
        try:
            probe = await self._prober.probe()
        except VduseError as error:
            log.get().warning("nobody answers the probe", error=str(error))
            return _ready(value=False)
        if not probe.ready:
            log.get().warning("not ready", problems=probe.problems)
        return _ready(value=probe.ready)


def _ready(*, value: bool) -> csi_pb2.ProbeResponse:
    response = csi_pb2.ProbeResponse()
    response.ready.value = value
    return response
