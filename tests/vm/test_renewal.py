"""A worker is killed while the disk of its storage server holds one of its writes: no later write is lost to that one."""

from __future__ import annotations

import asyncio
import contextlib
import subprocess
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from csi_vduse.proto import agent_pb2
from csi_vduse.storage.config import Address, ServerConfig
from csi_vduse.storage.server import StorageServer
from csi_vduse.storage.service import listening
from tests.unit.fakes.held_disk import HeldDisk
from tests.vm.conftest import MIB, RunningAgent, kill, leaves_nothing
from tests.vm.exports import tool
from tests.vm.test_agent import detach, inspect
from tests.vm.test_nbd import attach

SIZE_BYTES = 16 * MIB
BLOCK_BYTES = 4096
CALL_TIMEOUT_S = 240
# A successor that does not wait has served the write again by then.
UNFENCED_S = 10


@contextlib.contextmanager
def published_from(disk: HeldDisk, directory: Path) -> Iterator[agent_pb2.NbdBackend]:
    """Publish a volume of a storage server that runs in this process, with a daemon of its own, over the disk."""
    (directory / "pool").mkdir()
    control = Address(path=directory / "control.sock")
    config = ServerConfig(
        directory / "pool", directory / "run", control, Address(path=directory / "nbd.sock")
    )
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(act: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(act, loop).result(CALL_TIMEOUT_S)

    stack = AsyncExitStack()

    async def publish() -> str:
        server = StorageServer(config)
        await stack.enter_async_context(server.running())
        await stack.enter_async_context(listening(config, server))
        await server.create("v1", SIZE_BYTES)
        block = server._core.block
        assert block is not None
        node = {"driver": "nbd", "node-name": "v-v1", "server": {"type": "unix", "path": str(disk.path)}}
        await block.qmp.execute("blockdev-add", node)
        block.nodes.add("v-v1")
        return (await server.publish("v1", "node", read_only=False, shared=False)).uri

    try:
        yield agent_pb2.NbdBackend(uri=run(publish()), control=str(control))
    finally:
        run(stack.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def dd(source: Path, disk: str) -> list[str]:
    return ["dd", f"if={source}", f"of={disk}", f"bs={BLOCK_BYTES}", "oflag=direct", "conv=notrunc"]


def test_a_write_that_a_killed_worker_left_in_flight_is_not_done_after_a_later_one(
    shared: RunningAgent, tmp_path: Path
) -> None:
    first, later = b"first".ljust(BLOCK_BYTES), b"later".ljust(BLOCK_BYTES)
    for name, content in (("first", first), ("later", later)):
        (tmp_path / name).write_bytes(content)
    with (
        leaves_nothing(shared),
        HeldDisk(tmp_path / "disk.sock", SIZE_BYTES, first) as disk,
        published_from(disk, tmp_path) as backend,
    ):
        path = attach(shared, backend)
        writer = subprocess.Popen(dd(tmp_path / "first", path))
        assert disk.holds.wait(CALL_TIMEOUT_S), "the disk was not written to"
        kill(inspect(shared).attachment.worker_pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            writer.wait(UNFENCED_S)
        waits = writer.poll() is None
        if not waits:  # the application goes on while what the dead worker left is still to come
            tool(*dd(tmp_path / "later", path))
        disk.release()
        if waits:
            assert writer.wait(CALL_TIMEOUT_S) == 0
            tool(*dd(tmp_path / "later", path))
        time.sleep(1)
        assert disk.content(BLOCK_BYTES) == later
        detach(shared)
