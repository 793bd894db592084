"""What pools have in common whose volumes can be used on their own node and nowhere else."""

from __future__ import annotations

from collections.abc import Mapping

from csi_vduse.volumes.model import Volume


class OfOneNode:
    """The part of the Protocol Backend that is about publishing: there is nobody to publish to."""

    async def publish(self, volume: Volume, node_id: str, *, read_only: bool, shared: bool) -> dict[str, str]:
        """Nothing to do and nothing to tell: the image is where the node is."""
        del volume, node_id, read_only, shared
        return {}

    async def unpublish(self, volume_id: str, node_id: str) -> None:
        """Nothing to do."""

    async def published(self) -> Mapping[str, tuple[str, ...]]:
        """Nothing is remembered."""
        return {}

    async def nodes_of(self, volume_id: str) -> tuple[str, ...]:
        """Nothing is remembered."""
        del volume_id
        return ()
