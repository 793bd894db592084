"""Remote volumes: servers that are killed with the worker or without, and a network that is cut."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from csi_vduse.proto import agent_pb2
from tests.chaos.effort import Effort
from tests.chaos.vm import events
from tests.chaos.vm.load import VOLUME_BYTES, Shape, Volume, attach_request, make_image, under_load
from tests.vm import nbd_servers
from tests.vm.conftest import CALL_TIMEOUT_S, RunningAgent, wait_until
from tests.vm.exports import tool
from tests.vm.nbd_servers import NbdServer, serving

SHAPE = Shape(queues=2, packed=True, ext4=False)
STORAGE = "storage"
"""Network namespace of the storage machine; here ends the cable that leads there."""
OURS, THEIRS = "192.0.2.1", "192.0.2.2"


@contextlib.contextmanager
def remote_volume(agent: RunningAgent, server: NbdServer, *, write_through: bool = False) -> Iterator[Volume]:
    """A volume on this server's export, attached; detached in the end, whatever happened."""
    volume_id = "chaos-remote"
    backend = agent_pb2.Backend(nbd=agent_pb2.NbdBackend(uri=server.uri, write_through=write_through))
    try:
        disk = Path(agent.stub.Attach(attach_request(volume_id, backend, SHAPE), timeout=CALL_TIMEOUT_S).path)
        yield Volume(volume_id, SHAPE, disk, disk, disk)
    finally:
        agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=CALL_TIMEOUT_S)


def is_connected(agent: RunningAgent, volume: Volume) -> bool:
    return bool(events.inspect(agent, volume.id).stats.remote.state == "connected")


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("kind", ["nbdkit", "qemu-storage-daemon"])
def test_server_killed(
    shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random, kind: str
) -> None:
    """Again and again, with what it had in flight; some of the times the worker is killed while it is away.

    qemu-storage-daemon has a qcow2 image, and forgets then what was not flushed: hence write_through.
    """
    image = folder / "image"
    if kind == "nbdkit":
        server = nbd_servers.nbdkit(make_image(image))
    else:
        tool("qemu-img", "create", "-q", "-f", "qcow2", image, str(VOLUME_BYTES))
        server = nbd_servers.qemu(image, "qcow2")
    with (
        serving(server),
        remote_volume(shared, server, write_through=kind != "nbdkit") as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        for number in range(effort.server_kills):
            server.kill()
            wait_until(lambda: not is_connected(shared, volume), "word of the loss")
            if number % 4 == 1:
                events.kill_worker(shared, volume.id)
                events.worker_of(shared, volume.id)
            server.start()
            events.goes_on(shared, volume.id)
            load.goes_on()
    if kind != "nbdkit":
        tool("qemu-img", "check", "-q", "-r", "leaks", image)  # space that was taken and not used yet


@pytest.fixture
def cable() -> Iterator[None]:
    """A network with a storage machine."""
    tool("ip", "netns", "add", STORAGE)
    try:
        tool("ip", "link", "add", STORAGE, "type", "veth", "peer", "name", "cable", "netns", STORAGE)
        tool("ip", "address", "add", f"{OURS}/30", "dev", STORAGE)
        tool("ip", "link", "set", STORAGE, "up")
        tool("ip", "-n", STORAGE, "address", "add", f"{THEIRS}/30", "dev", "cable")
        connect("up")
        yield
    finally:
        tool("ip", "netns", "delete", STORAGE)


def connect(how: str) -> None:
    """Plug the cable in ("up") or out ("down"), at the storage machine's end."""
    tool("ip", "-n", STORAGE, "link", "set", "cable", how)


@pytest.mark.usefixtures("cable", "clean")
def test_network_cut(shared: RunningAgent, folder: Path, effort: Effort, dice: random.Random) -> None:
    """Requests wait, for as long as it takes; the storage machine does not even know."""
    server = nbd_servers.nbdkit(make_image(folder / "image"), host=THEIRS)
    server.argv = ["ip", "netns", "exec", STORAGE, *server.argv]
    with (
        serving(server),
        remote_volume(shared, server) as volume,
        under_load([volume], folder, dice.randrange(1 << 30)) as load,
    ):
        for _ in range(2):
            connect("down")
            time.sleep(effort.link_cut_s)
            load.goes_on()
            connect("up")
            events.goes_on(shared, volume.id)
