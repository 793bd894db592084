"""The CNI plugin: a pod gets a network card of a vhost-user server, through the agent.

A network's configuration, beside what every plugin has:

    "socket": the server's socket of a pod, with {container}, {interface}, {namespace} or {pod} in it
    "runDir": the agent's; "mtu": bytes; "ipam": another plugin, which gives addresses

Kept true: a card's name says whose it is, so that DEL and GC need no record of ours; an ADD that fails leaves nothing.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final

from csi_vduse.agent.client import AgentClient
from csi_vduse.agent.model import AttachSpec
from csi_vduse.cni import interfaces
from csi_vduse.cni.model import VERSIONS, Request, card_name, cards_of, read
from csi_vduse.config import AgentConfig
from csi_vduse.dataplane.backend_spec import VhostUserBackend
from csi_vduse.errors import CommandFailed, InvalidArgument, Pending, Unavailable, VduseError
from csi_vduse.run import run

_IPAM_TIMEOUT_S: Final = 60.0
# Codes of the specification; those from 100 on are a plugin's own.
_CODES: Final = {InvalidArgument: 7, Pending: 11, Unavailable: 11}
_OTHER: Final = 100


def main(environment: Mapping[str, str], stdin: str) -> tuple[int, str]:
    """Do what a container runtime asks for; returns the exit code and what to print."""
    try:
        request = read(environment, stdin)
        result = asyncio.run(_perform(request, environment))
    except Exception as error:  # noqa: BLE001 - a container runtime understands nothing but the answer below
        code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), _OTHER)
        hint = error.hint if isinstance(error, VduseError) else ""
        message = error.message if isinstance(error, VduseError) else str(error)
        shown = {"cniVersion": VERSIONS[-1], "code": code, "msg": message, "details": hint}
        return 1, json.dumps(shown)
    return 0, json.dumps(result) if result else ""


async def _perform(request: Request, environment: Mapping[str, str]) -> dict[str, Any]:
    if request.command == "VERSION":
        return {"cniVersion": VERSIONS[-1], "supportedVersions": list(VERSIONS)}
    if request.version not in VERSIONS:
        raise InvalidArgument(f"cniVersion {request.version!r}", hint=f"one of {', '.join(VERSIONS)}")
    async with AsyncExitStack() as up:
        agent = AgentClient(AgentConfig(run_dir=request.run_dir).socket_path)
        up.push_async_callback(agent.close)
        match request.command:
            case "ADD":
                return await _add(agent, request, environment)
            case "DEL":
                await agent.detach(request.card)
                await _ipam(request, environment)
            case "CHECK":
                await _check(agent, request, environment)
            case "GC":
                await _collect(agent, request, environment)
            case "STATUS":
                await _status(agent)
    return {}


async def _add(agent: AgentClient, request: Request, environment: Mapping[str, str]) -> dict[str, Any]:
    spec = AttachSpec(request.card, VhostUserBackend(request.socket()), 0, is_network=True)
    async with AsyncExitStack() as undo:
        undo.push_async_callback(agent.detach, request.card)
        attached = await agent.attach(spec)
        if attached.path is None:
            raise Unavailable(f"card {request.card} has no interface yet", hint="retry")
        # In threads: pyroute2 has an event loop of its own.
        await asyncio.to_thread(interfaces.move, attached.path.name, request.netns, request.interface)
        undo.push_async_callback(_ipam, request, {**environment, "CNI_COMMAND": "DEL"})
        given = await _ipam(request, environment)
        ips = [{**each, "interface": 0} for each in given.get("ips", [])]
        addresses, routes = [each["address"] for each in ips], given.get("routes", [])
        mtu = int(request.network.get("mtu", 0))
        mac = await asyncio.to_thread(
            interfaces.set_up, request.netns, request.interface, addresses, routes, mtu=mtu
        )
        undo.pop_all()
    return {
        "cniVersion": request.version,
        "interfaces": [{"name": request.interface, "mac": mac, "sandbox": request.netns}],
        "ips": ips,
        "routes": routes,
        "dns": given.get("dns", {}),
    }


async def _check(agent: AgentClient, request: Request, environment: Mapping[str, str]) -> None:
    await agent.inspect(request.card)
    before = request.network.get("prevResult", {})
    addresses = [each["address"] for each in before.get("ips", [])]
    await asyncio.to_thread(interfaces.check, request.netns, request.interface, addresses)
    await _ipam(request, environment)


async def _collect(agent: AgentClient, request: Request, environment: Mapping[str, str]) -> None:
    """Remove the cards of this network that no container has any more."""
    name = request.network["name"]
    valid = {
        card_name(name, each["containerID"], each["ifname"])
        for each in request.network.get("cni.dev/valid-attachments", [])
    }
    for attachment in await agent.list():
        card = attachment.volume_id
        if card.startswith(cards_of(name)) and card not in valid:
            await agent.detach(card)
    await _ipam(request, environment)


async def _status(agent: AgentClient) -> None:
    found = await agent.probe()
    if not found.ready:
        raise Unavailable(f"the agent cannot work: {'; '.join(found.problems)}")


async def _ipam(request: Request, environment: Mapping[str, str]) -> dict[str, Any]:
    """Ask the plugin that gives addresses, in the words that we were asked in; nothing without one.

    Raises:
        InvalidArgument: there is none of that name.
        VduseError: it said no, and why.
    """
    kind = request.network.get("ipam", {}).get("type")
    if not kind:
        return {}
    found = [folder / kind for folder in request.path if "/" not in kind and (folder / kind).is_file()]
    if not found:
        raise InvalidArgument(
            f"there is no CNI plugin {kind!r} in CNI_PATH", hint="for `ipam` of the network"
        )
    names = {key: value for key, value in environment.items() if key.startswith("CNI_")}
    stdin = json.dumps(request.network).encode()
    try:
        said = await run([str(found[0])], timeout_s=_IPAM_TIMEOUT_S, env=names, stdin=stdin)
    except CommandFailed as error:
        raise VduseError(f"CNI plugin {kind}: {error}") from error
    result: dict[str, Any] = json.loads(said.stdout) if said.stdout.strip() else {}
    return result
