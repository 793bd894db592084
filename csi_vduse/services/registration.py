"""How the node plugin makes itself known to kubelet, without a sidecar: kubelet's plugin registration, v1.

Kubelet watches `plugins_registry` for sockets and asks each who it is. Ours appears only when the agent can
work, so that kubelet does not announce the driver (CSINode), and the scheduler sends no pods, before.
Source: k8s.io/kubelet/pkg/apis/pluginregistration/v1, and kubelet's pluginwatcher.
"""
# ruff: noqa: N802, ARG002, ANN401 - names and signatures are gRPC's

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import grpc

from csi_vduse import log
from csi_vduse.agent.server import claim_socket
from csi_vduse.errors import FailedPrecondition
from csi_vduse.proto import pluginregistration_pb2 as messages
from csi_vduse.proto import pluginregistration_pb2_grpc

CSI_VERSIONS = ("1.0.0",)  # the major version is all that kubelet compares
_SOCKET_UMASK = 0o177  # kubelet is root

Registered = Callable[[], Awaitable[None]]


class Registration(pluginregistration_pb2_grpc.RegistrationServicer):
    """Answers kubelet's two questions.

    Args:
        driver_name: ours.
        endpoint: path of the CSI socket as kubelet sees it.
        on_registered: called when kubelet has registered us, each time.
    """

    def __init__(self, *, driver_name: str, endpoint: Path, on_registered: Registered) -> None:
        self._driver_name = driver_name
        self._endpoint = endpoint
        self._on_registered = on_registered
        self.problem = "kubelet has not registered the driver yet"

    async def GetInfo(self, request: messages.InfoRequest, context: Any) -> messages.PluginInfo:
        """Say who we are."""
        return messages.PluginInfo(
            type="CSIPlugin",
            name=self._driver_name,
            endpoint=str(self._endpoint),
            supported_versions=CSI_VERSIONS,
        )

    async def NotifyRegistrationStatus(
        self, request: messages.RegistrationStatus, context: Any
    ) -> messages.RegistrationStatusResponse:
        """Hear how it went; kubelet tries again by itself."""
        if request.plugin_registered:
            self.problem = ""
            log.get().info("kubelet has registered the driver")
            await self._on_registered()
        else:
            self.problem = f"kubelet did not register the driver: {request.error}"
            log.get().error("kubelet did not register the driver", error=request.error)
        return messages.RegistrationStatusResponse()


async def serve_registration(registration: Registration, socket_path: Path) -> grpc.aio.Server:
    """Lay the socket into kubelet's directory; the caller stops the server, which takes it away.

    Raises:
        FailedPrecondition: it cannot be bound, or another process serves it.
    """
    try:
        claim_socket(socket_path)
    except OSError as error:
        raise FailedPrecondition(
            f"cannot register at {socket_path}: {error}", hint="check --kubelet-dir"
        ) from error
    server = grpc.aio.server()
    pluginregistration_pb2_grpc.add_RegistrationServicer_to_server(registration, server)
    before = os.umask(_SOCKET_UMASK)
    try:
        server.add_insecure_port(f"unix:{socket_path}")
        await server.start()
    except RuntimeError as error:  # what gRPC raises when it cannot bind
        raise FailedPrecondition(
            f"cannot register at {socket_path}: {error}", hint="check --kubelet-dir"
        ) from error
    finally:
        os.umask(before)
    return server
