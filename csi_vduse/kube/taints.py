"""Taking the start-up taint off a node: what keeps pods away until the driver is registered there.

Whoever makes nodes puts the taint on them (`kubelet --register-with-taints`, a cloud's node group); the
driver only ever takes off the one that it is told of.
"""

from __future__ import annotations

from csi_vduse import log
from csi_vduse.errors import NotFound, Unavailable
from csi_vduse.kube.api import ApiServer, Conflict
from csi_vduse.kube.resources import CORE_NODES, version_of

_TRIES = 8  # kubelet writes to its Node often


async def remove_taint(api: ApiServer, node: str, key: str) -> bool:
    """Take the taint off; tells whether it was there.

    Raises:
        NotFound: there is no such node.
        Unavailable: the API is away, or the node changes all the time.
    """
    for _ in range(_TRIES):
        found = await api.get(CORE_NODES, node)
        if found is None:
            raise NotFound(f"node {node!r} does not exist", hint="--node-id must be the node's name")
        taints = found["spec"].get("taints") or []
        kept = [taint for taint in taints if taint.get("key") != key]
        if len(kept) == len(taints):
            return False
        patch = {"metadata": {"resourceVersion": version_of(found)}, "spec": {"taints": kept or None}}
        try:
            await api.patch(CORE_NODES, node, patch)
        except Conflict:
            continue
        log.get().info("the start-up taint is gone", key=key)
        return True
    raise Unavailable(f"node {node!r} changes all the time")
