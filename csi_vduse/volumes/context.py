"""A volume's immutable settings as CSI's volume_context: plain text pairs, shown by `kubectl get pv -o yaml`.

They are for people and for checks; the registry is what the node trusts.
"""

from __future__ import annotations

from csi_vduse.volumes.model import Volume

# Of a publish_context: "true" if the node may only read the volume; else not there.
READ_ONLY = "readOnly"


def volume_context(volume: Volume) -> dict[str, str]:
    """Return the pairs; the same for the whole life of the volume. `queues` 0: the node chooses."""
    return {
        "backend": volume.backend,
        "pool": volume.pool,
        "bus": volume.parameters.bus.value,
        "queues": str(volume.parameters.queues),
        "queueSize": str(volume.parameters.queue_size),
        "blockSize": str(volume.parameters.block_size_bytes),
    }
