"""The configured pools by name, and which one a request means."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from csi_vduse.backends.base import Backend
from csi_vduse.backends.file import KIND as FILE
from csi_vduse.backends.file import FilePool
from csi_vduse.backends.file import parse_location as parse_file_location
from csi_vduse.backends.nbd import KIND as NBD
from csi_vduse.backends.nbd import NbdPool, parse_location
from csi_vduse.backends.nbd import data_path as nbd_data_path
from csi_vduse.backends.qsd import KIND as QSD
from csi_vduse.backends.qsd import QsdPool
from csi_vduse.backends.qsd import parse_location as parse_qsd_location
from csi_vduse.config import PoolConfig
from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.errors import FailedPrecondition, InvalidArgument
from csi_vduse.volumes.model import Volume

DEFAULT_POOL = "default"


class Pools:
    """All pools of this process.

    Args:
        backends: one for each pool; names differ.
    """

    def __init__(self, backends: Iterable[Backend]) -> None:
        self._backends = {backend.name: backend for backend in backends}

    def __iter__(self) -> Iterator[Backend]:
        return iter(self._backends.values())

    def close(self) -> None:
        """Stop the pools' threads and connections."""
        for backend in self:
            backend.close()

    @property
    def names(self) -> list[str]:
        """The names, sorted."""
        return sorted(self._backends)

    def default_name(self) -> str | None:
        """Return the pool for requests that name none: the only one, or the one called "default"."""
        if len(self._backends) == 1:
            return next(iter(self._backends))
        return DEFAULT_POOL if DEFAULT_POOL in self._backends else None

    def named(self, name: str) -> Backend:
        """Return a pool that a caller named.

        Raises:
            InvalidArgument: there is none of that name.
        """
        if name not in self._backends:
            raise InvalidArgument(
                f"parameter pool: {name!r} is not a pool here; allowed: {', '.join(self.names)}"
            )
        return self._backends[name]

    def holding(self, name: str) -> Backend:
        """Return the pool of a recorded volume.

        Raises:
            FailedPrecondition: the pool has been taken out of the configuration.
        """
        if name not in self._backends:
            raise FailedPrecondition(
                f"pool {name!r} is not configured any more", hint="start with that --pool again"
            )
        return self._backends[name]

    async def data_path(self, volume: Volume, publish_context: Mapping[str, str]) -> BackendSpec:
        """Return where a volume's bytes are: its pool knows, or what the node was told says it all.

        Raises:
            FailedPrecondition: the pool is not here, or the volume was not published to this node.
        """
        if volume.backend == NBD:
            return nbd_data_path(volume.id, publish_context)
        return await self.holding(volume.pool).data_path(volume, publish_context)


def open_pools(configs: Iterable[PoolConfig], state_dir: Path) -> Pools:
    """Make the pools of the configuration; touches no storage yet.

    Args:
        configs: with names that differ.
        state_dir: remembers the pools' marks below `pools/`.

    Raises:
        InvalidArgument: a kind that we do not have.
    """
    backends: list[Backend] = []
    for config in configs:
        memory = state_dir / "pools" / f"{config.name}.json"
        if config.kind == FILE:
            place = parse_file_location(config.location)
            backends.append(
                FilePool(config.name, place.directory, memory=memory, max_hold_s=place.max_hold_s)
            )
        elif config.kind == NBD:
            backends.append(NbdPool(config.name, parse_location(config.location), memory=memory))
        elif config.kind == QSD:
            backends.append(QsdPool(config.name, parse_qsd_location(config.location), memory=memory))
        else:
            raise InvalidArgument(
                f"pool {config.name!r} has unknown kind {config.kind!r}; allowed: {FILE}, {NBD}, {QSD}"
            )
    return Pools(backends)
