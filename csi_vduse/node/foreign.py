"""Volumes that this node is given and its registry does not know.

Such are exports made beforehand on any NBD server, and volumes of a controller whose registry is elsewhere.

All there is to know of them is what the request says and what the server says of the export. A record of it is
kept below the state directory for the calls that come after NodeStageVolume. Nothing about a file system is kept
beyond one staging: another node may have used the volume since, so each time its content decides, and only
what is proved blank is formatted.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from csi_vduse import records
from csi_vduse.agent.model import device_name
from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool
from csi_vduse.volumes.model import State, Volume, volume_from_json, volume_to_json
from csi_vduse.volumes.parameters import VOLUME_CONTEXT_PARAMETERS, parse

# Of the request's context, as backends/nbd.py tells it: where the export is, and that a server fences it.
URI = "uri"
EPOCH = "epoch"
BACKEND = "nbd"


@dataclass(frozen=True)
class ForeignVolumes:
    """See the module.

    Args:
        directory: of the records.
        size_of: asks the server how large an export is, in bytes.
    """

    directory: Path
    size_of: Callable[[BackendSpec], Awaitable[int]]
    threads: BlockingPool

    async def find(self, volume_id: str) -> Volume | None:
        """Return a volume that was staged here, or None."""
        record = await self.threads.run(DEFAULT_TIMEOUT_S, records.read_record, self._path(volume_id))
        volume = volume_from_json(record) if record is not None else None
        return volume if volume is not None and volume.id == volume_id else None

    async def update(self, volume_id: str, change: Callable[[Volume], Volume]) -> bool:
        """Change the record of a volume; False if there is none. The caller holds the volume's lock."""
        volume = await self.find(volume_id)
        if volume is None:
            return False
        await self._write(change(volume))
        return True

    async def adopt(
        self,
        volume_id: str,
        context: Mapping[str, str],
        data_path: Callable[[Volume, Mapping[str, str]], BackendSpec],
    ) -> Volume:
        """Make the record of a volume from a request.

        Args:
            volume_id: as the request has it.
            context: volume_context and publish_context together; has a URI.
            data_path: tells what the agent is given for it.

        Raises:
            InvalidArgument: a parameter in the context is wrong.
            VduseError: the server does not say how large the export is.
        """
        asked = parse({key: context[key] for key in VOLUME_CONTEXT_PARAMETERS if _is_set(key, context)})
        parameters = asked.resolve()
        volume = Volume(
            id=volume_id,
            name=volume_id,
            pool=context.get("pool", ""),
            backend=BACKEND,
            capacity_bytes=parameters.block_size_bytes,
            parameters=parameters,
            source=None,
            filesystem=None,
            state=State.READY,
            created_at_ns=time.time_ns(),
        )
        size_bytes = await self.size_of(data_path(volume, context))
        block_bytes = parameters.block_size_bytes
        volume = replace(volume, capacity_bytes=size_bytes // block_bytes * block_bytes)
        await self._write(volume)
        return volume

    async def forget(self, volume_id: str) -> None:
        """Remove the record; fine if there is none."""
        await self.threads.run(DEFAULT_TIMEOUT_S, records.delete_record, self._path(volume_id))

    async def _write(self, volume: Volume) -> None:
        path, record = self._path(volume.id), volume_to_json(volume)
        await self.threads.run(DEFAULT_TIMEOUT_S, records.write_record, path, record)

    def _path(self, volume_id: str) -> Path:
        return self.directory / f"{device_name(volume_id)}.json"


def _is_set(key: str, context: Mapping[str, str]) -> bool:
    """Tell whether a parameter is given; `queues` 0 in a volume_context leaves them to the node."""
    return key in context and not (key == "queues" and context[key] == "0")
