"""`csi-vduse storage-server` as a process: killed, it leaves its clients connected; stopped, it leaves nothing."""

import asyncio
import contextlib
import signal
import subprocess
import sys

import pytest

from csi_vduse.errors import VduseError
from csi_vduse.storage.client import StorageClient
from csi_vduse.storage.config import Address
from csi_vduse.storage.model import Key, Kind
from tests.unit.storage.nbd_client import NbdClient

MIB = 1 << 20
START_TIMEOUT_S = 120


class Process:
    """The program below `directory`, and a client of it."""

    def __init__(self, directory):
        self.directory = directory
        self.process = None
        self.client = StorageClient(Address(path=directory / "control.sock"), None)

    async def start(self):
        argv = [sys.executable, "-c", "import sys; from csi_vduse.cli.main import main; sys.exit(main())"]
        argv += ["storage-server", "--no-tls", "--directory", self.directory / "pool"]
        argv += ["--run-dir", self.directory / "run", "--nbd", f"unix:{self.directory}/nbd.sock"]
        argv += ["--control", f"unix:{self.directory}/control.sock"]
        self.process = subprocess.Popen(argv, stderr=subprocess.DEVNULL)
        async with asyncio.timeout(START_TIMEOUT_S):
            while True:
                assert self.process.poll() is None
                with contextlib.suppress(VduseError):
                    return await self.client.pool_id()
                await asyncio.sleep(0.05)

    def end(self, number):
        self.process.send_signal(number)
        return self.process.wait(60)

    def daemons(self):
        found = subprocess.run(
            ["pgrep", "-f", f"path={self.directory}/run/qmp.sock"],
            capture_output=True,
            text=True,
            check=False,
        )
        return found.stdout.split()


@pytest.fixture
async def process(tmp_path):
    (tmp_path / "pool").mkdir()
    running = Process(tmp_path)
    await running.start()
    yield running
    if running.process.poll() is None:
        running.end(signal.SIGTERM)
    await running.client.close()


async def test_a_killed_server_leaves_its_clients_connected_and_its_successor_takes_over(process):
    await process.client.create("v1", MIB)
    granted = await process.client.publish("v1", "a", read_only=False, shared=False)
    node = NbdClient(granted.uri)
    node.write(0, b"kept" * 128)
    (daemon,) = process.daemons()
    process.end(signal.SIGKILL)
    node.write(512, b"more" * 128)
    await process.start()
    assert process.daemons() == [daemon]
    assert node.read(0, 1024) == b"kept" * 128 + b"more" * 128
    assert await process.client.publish("v1", "a", read_only=False, shared=False) == granted
    await process.client.unpublish("v1")
    await process.client.delete(Key(Kind.VOLUME, "v1"))
    node.close()


async def test_a_server_that_is_stopped_takes_its_daemon_with_it_and_keeps_the_volumes(process):
    await process.client.create("v1", MIB)
    granted = await process.client.publish("v1", "a", read_only=False, shared=False)
    assert process.end(signal.SIGTERM) == 0
    assert process.daemons() == []
    assert not (process.directory / "control.sock").exists()
    await process.start()
    node = NbdClient(granted.uri)
    assert node.size_bytes == MIB
    node.close()
