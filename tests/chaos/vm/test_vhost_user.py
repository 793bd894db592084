"""Volumes whose rings a vhost-user server works on: it, their worker, and both at once are killed."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from csi_vduse.proto import agent_pb2
from tests.chaos.effort import Effort
from tests.chaos.vm import events
from tests.chaos.vm.load import Shape, Volume, attach_request, make_image, under_load
from tests.vm import vhost_user_servers
from tests.vm.conftest import CALL_TIMEOUT_S, RunningAgent, wait_until
from tests.vm.vhost_user_servers import Server, serving

SHAPE = Shape(queues=2, packed=False, ext4=False)
VOLUME = "chaos-vhost-user"


def goes_on(agent: RunningAgent) -> None:
    """Wait until the driver is interrupted again, which it is when requests have come back."""
    before = events.inspect(agent, VOLUME).stats.interrupts
    wait_until(
        lambda: events.inspect(agent, VOLUME).stats.interrupts > before + 20, "requests that come back"
    )


def kill_server(agent: RunningAgent, server: Server) -> None:
    losses = events.inspect(agent, VOLUME).stats.remote.losses
    server.kill()
    wait_until(lambda: events.inspect(agent, VOLUME).stats.remote.losses > losses, "word of the loss")
    server.start()


def kill_worker(agent: RunningAgent, _: Server) -> None:
    events.kill_worker(agent, VOLUME)


def kill_both(agent: RunningAgent, server: Server) -> None:
    server.kill()
    events.kill_worker(agent, VOLUME)
    server.start()


@pytest.mark.usefixtures("clean")
@pytest.mark.parametrize("make", [vhost_user_servers.ours, vhost_user_servers.rte, vhost_user_servers.qsd])
def test_servers_and_workers_killed(
    shared: RunningAgent,
    folder: Path,
    effort: Effort,
    dice: random.Random,
    make: Callable[[Path, Path], Server],
) -> None:
    """As often as servers of other kinds, workers as often, and now and then both."""
    kills = [kill_server, kill_worker] * effort.server_kills + [kill_both] * (2 * effort.server_kills // 5)
    dice.shuffle(kills)
    image = make_image(folder / "image")
    with serving(make(folder / "sock", image)) as server:
        backend = agent_pb2.Backend(vhost_user=agent_pb2.VhostUserBackend(socket=str(server.socket)))
        path = shared.stub.Attach(attach_request(VOLUME, backend, SHAPE), timeout=CALL_TIMEOUT_S).path
        disk = Path(path)
        volume = Volume(VOLUME, SHAPE, image, disk, disk)
        try:
            with under_load([volume], folder, dice.randrange(1 << 30)) as load:
                for kill in kills:
                    kill(shared, server)
                    events.worker_of(shared, VOLUME)
                    goes_on(shared)
                    load.goes_on()
        finally:
            shared.stub.Detach(agent_pb2.DetachRequest(volume_id=VOLUME), timeout=CALL_TIMEOUT_S)
