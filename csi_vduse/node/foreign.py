"""Volumes that this node is given and its registry does not know.

Such are exports made beforehand on any NBD server, and volumes of a controller whose registry is elsewhere.

All there is to know of them is what the request says and what the server says of the export. A record of it is
kept below the state directory for the calls that come after NodeStageVolume. Nothing about a file system is kept
beyond one staging: another node may have used the volume since, so each time its content decides, and only
what is proved blank is formatted. The one exception is a format that was interrupted, within one epoch: the server
has let nobody else write since.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from csi_vduse import records
from csi_vduse.agent.model import device_name
from csi_vduse.dataplane.backend_spec import BackendSpec
from csi_vduse.dataplane.config_space import BLOCK_SIZES
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool
from csi_vduse.volumes.model import FilesystemState, State, Volume, volume_from_json, volume_to_json
from csi_vduse.volumes.parameters import VOLUME_CONTEXT_PARAMETERS, AskedParameters, parse

# Of the request's context, as backends/nbd.py tells it: where the export is, and that a server fences it.
URI = "uri"
EPOCH = "epoch"
BACKEND = "nbd"


@dataclass(frozen=True)
class Export:
    """What a server says of an export.

    Args:
        size_bytes: of its content.
        min_block_bytes: what requests must be multiples of; 0 or 1 if it does not say.
        read_only: it refuses writes.
        multi_conn: it may be used through several connections, so by several queues.
    """

    size_bytes: int
    min_block_bytes: int
    read_only: bool
    multi_conn: bool


@dataclass(frozen=True)
class Given:
    """A volume as it was given to this node; read_only: its server refuses writes."""

    volume: Volume
    read_only: bool


@dataclass(frozen=True)
class ForeignVolumes:
    """See the module.

    Args:
        directory: of the records.
        ask: asks the server of an export about it.
    """

    directory: Path
    ask: Callable[[BackendSpec], Awaitable[Export]]
    threads: BlockingPool

    async def find(self, volume_id: str) -> Volume | None:
        """Return a volume that was staged here, or None."""
        record = await self._read(volume_id)
        return volume_from_json(record) if record is not None else None

    async def staged(self, volume_id: str, context: Mapping[str, str]) -> Given | None:
        """Return a volume that was staged here, with what may be believed of its file system now, or None.

        context: as `adopt`.
        """
        record = await self._read(volume_id)
        if record is None:
            return None
        volume = volume_from_json(record)
        if not _is_begun_here(volume, record, context):
            volume = replace(volume, filesystem=None)
        return Given(volume, read_only=record.get("server_read_only", False))

    async def update(self, volume_id: str, change: Callable[[Volume], Volume]) -> bool:
        """Change the record of a volume; False if there is none. The caller holds the volume's lock."""
        record = await self._read(volume_id)
        if record is None:
            return False
        await self._write(volume_id, {**record, **volume_to_json(change(volume_from_json(record)))})
        return True

    async def adopt(
        self,
        volume_id: str,
        context: Mapping[str, str],
        data_path: Callable[[Volume, Mapping[str, str]], Awaitable[BackendSpec]],
    ) -> Given:
        """Make the record of a volume from a request, and from what its server says where the request is silent.

        Args:
            volume_id: as the request has it.
            context: volume_context and publish_context together; has a URI.
            data_path: tells what the agent is given for it.

        Raises:
            InvalidArgument: a parameter in the context is wrong.
            VduseError: the server does not say what the export is.
        """
        before = await self.staged(volume_id, context)
        asked = parse({key: context[key] for key in VOLUME_CONTEXT_PARAMETERS if _is_set(key, context)})
        volume = Volume(
            id=volume_id,
            name=volume_id,
            pool=context.get("pool", ""),
            backend=BACKEND,
            capacity_bytes=0,
            parameters=asked.resolve(),
            source=None,
            filesystem=before.volume.filesystem if before is not None else None,
            state=State.READY,
            created_at_ns=time.time_ns(),
        )
        export = await self.ask(await data_path(volume, context))
        volume = replace(volume, parameters=_completed(asked, export).resolve())
        volume = replace(volume, capacity_bytes=_capacity_bytes(volume, export))
        record = {
            **volume_to_json(volume),
            "server_read_only": export.read_only,
            **{key: context[key] for key in (URI, EPOCH) if key in context},
        }
        await self._write(volume_id, record)
        return Given(volume, export.read_only)

    async def take_over_growth(self, volume_id: str, backend: BackendSpec) -> Volume | None:
        """Look whether the server of a volume that was staged here has grown it; return it as it is now, or None.

        backend: what it is served from.

        Raises:
            VduseError: the server does not say.
        """
        volume = await self.find(volume_id)
        if volume is None:
            return None
        capacity_bytes = _capacity_bytes(volume, await self.ask(backend))
        if capacity_bytes <= volume.capacity_bytes:
            return volume
        await self.update(volume_id, lambda now: replace(now, capacity_bytes=capacity_bytes))
        return replace(volume, capacity_bytes=capacity_bytes)

    async def forget(self, volume_id: str) -> None:
        """Remove the record; fine if there is none."""
        await self.threads.run(DEFAULT_TIMEOUT_S, records.delete_record, self._path(volume_id))

    async def _read(self, volume_id: str) -> dict[str, Any] | None:
        record = await self.threads.run(DEFAULT_TIMEOUT_S, records.read_record, self._path(volume_id))
        return record if record is not None and record.get("id") == volume_id else None

    async def _write(self, volume_id: str, record: Mapping[str, Any]) -> None:
        await self.threads.run(DEFAULT_TIMEOUT_S, records.write_record, self._path(volume_id), record)

    def _path(self, volume_id: str) -> Path:
        return self.directory / f"{device_name(volume_id)}.json"


def _is_begun_here(volume: Volume, record: Mapping[str, Any], context: Mapping[str, str]) -> bool:
    """Tell whether a format was begun under the epoch that is given now, so that nobody else has written since."""
    return (
        volume.filesystem is not None
        and volume.filesystem.state is FilesystemState.FORMATTING
        and EPOCH in context
        and all(record.get(key) == context.get(key) for key in (URI, EPOCH))
    )


def _completed(asked: AskedParameters, export: Export) -> AskedParameters:
    """Let the server say how many queues and how small blocks it takes; what it cannot say is the worker's to refuse."""
    if asked.queues is None and not export.multi_conn:
        asked = replace(asked, queues=1)
    if asked.block_size_bytes is None:
        fitting = next((size for size in BLOCK_SIZES if size >= export.min_block_bytes), None)
        asked = replace(asked, block_size_bytes=fitting)
    return asked


def _capacity_bytes(volume: Volume, export: Export) -> int:
    block_bytes = volume.parameters.block_size_bytes
    return export.size_bytes // block_bytes * block_bytes


def _is_set(key: str, context: Mapping[str, str]) -> bool:
    """Tell whether a parameter is given; `queues` 0 in a volume_context leaves them to the node."""
    return key in context and not (key == "queues" and context[key] == "0")
