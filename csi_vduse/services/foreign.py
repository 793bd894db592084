"""What a node process keeps of volumes that its registry does not know (node/foreign.py): records, and their servers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from csi_vduse.agent import renewal
from csi_vduse.dataplane.backend_spec import BackendSpec, NbdBackend
from csi_vduse.dataplane.nbd_config import probe
from csi_vduse.errors import InvalidArgument
from csi_vduse.node.foreign import Export, ForeignVolumes
from csi_vduse.volumes.blocking import DEFAULT_TIMEOUT_S, BlockingPool

_SERVER_TIMEOUT_S = 30.0
_THREADS = 2


@contextmanager
def foreign_volumes(state_dir: Path) -> Iterator[ForeignVolumes]:
    """Give them while the body runs; their records are below the state directory."""
    threads = BlockingPool("foreign", _THREADS)
    try:
        yield ForeignVolumes(state_dir / "foreign", partial(_ask, threads), threads)
    finally:
        threads.close()


async def _ask(threads: BlockingPool, backend: BackendSpec) -> Export:
    """Ask an NBD server what an export is."""
    if not isinstance(backend, NbdBackend):
        raise InvalidArgument(f"{backend} has no server that could be asked about it")
    if backend.control:
        backend = await renewal.current(backend)
    found = await threads.run(DEFAULT_TIMEOUT_S, partial(probe, backend, timeout_s=_SERVER_TIMEOUT_S))
    return Export(found.size_bytes, found.min_block_bytes, found.read_only, found.multi_conn)
