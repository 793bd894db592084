"""Waiting for a node to do what an object asks for: as long as a caller waits, with the node's words if in vain."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

from csi_vduse.errors import DeadlineExceeded, Pending
from csi_vduse.kube.api import ApiServer
from csi_vduse.kube.mirror import Mirror
from csi_vduse.kube.resources import Object, Resource, is_going
from csi_vduse.volumes import kubernetes_objects as objects

# Sidecars give a call a minute or two; a copy that takes longer is waited for by their next tries.
WAIT_S = 100.0
_LOOK_AGAIN_S = 5.0


async def wait_settled(mirror: Mirror, name: str, what: str) -> Object:
    """Wait until a new object is ready, failed, or on its way out.

    Raises:
        DeadlineExceeded: with what the node last said hinders it, or how far it is.
    """

    def settled(found: Object | None) -> bool:
        return found is not None and (is_going(found) or objects.has_state(found, "Ready", objects.FAILED))

    try:
        found = await mirror.wait_for(name, settled, timeout_s=WAIT_S, what=what)
    except DeadlineExceeded as error:
        status = (mirror.get(name) or {}).get("status") or {}
        copied = f"{status['copied']} is copied" if "copied" in status else ""
        said = status.get("error", {}).get("message", "") or copied
        if said:
            raise DeadlineExceeded(f"{error.message}: {said}", hint=error.hint) from error
        raise
    if found is None:
        raise Pending(f"{name} has changed", hint="retry")
    return found


async def wait_gone(api: ApiServer, mirror: Mirror, resource: Resource, name: str) -> None:
    """Wait until a deleted object is gone: its node has removed what it stands for.

    Raises:
        DeadlineExceeded: with what the node last said hinders it.
    """
    until_s = time.monotonic() + WAIT_S
    while (found := await api.get(resource, name)) is not None:
        if time.monotonic() > until_s:
            said = found.get("status", {}).get("error", {}).get("message", "")
            raise DeadlineExceeded(
                f"{resource.kind} {name} is still there after {WAIT_S:g} s{': ' + said if said else ''}",
                hint=f"is the driver running on node {found['spec'].get('nodeName') or '?'}?",
            )
        if mirror.get(name) is None:  # not seen yet; the watch cannot tell when it goes
            await asyncio.sleep(_LOOK_AGAIN_S / 10)
            continue
        with suppress(DeadlineExceeded):
            await mirror.wait_for(name, lambda now: now is None, timeout_s=_LOOK_AGAIN_S, what="its end")
