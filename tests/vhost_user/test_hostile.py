"""Whatever a front-end or its guest does, the server serves the next one, and has lost nothing."""

from __future__ import annotations

import contextlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from dataclasses import replace

from csi_vduse.dataplane.vhost_user.protocol import Request
from lab.vhost_client import obtain
from tests.vhost_user.exported import Exported
from tests.vhost_user.frontend import SIZE, Frontend, state
from tests.vhost_user.test_block_client import wait_until_idle

Export = Callable[..., Exported]


@contextlib.contextmanager
def connected(exported: Exported) -> Iterator[Frontend]:
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(str(exported.socket))
    frontend = Frontend(sock)
    try:
        yield frontend
    finally:
        frontend.close()


def test_a_front_end_is_told_of_each_fault_of_its_guest(export: Export) -> None:
    exported = export("null:64M")
    with connected(exported) as frontend:
        frontend.start()
        for _ in range(2):
            frontend.make_available(SIZE)  # no such head
            assert frontend.signalled(frontend.error)
            frontend.take_back(1)
            assert frontend.ask(Request.GET_VRING_BASE, state(0, 0))
            frontend.give_ring()
    assert exported.log_text().count("queue stopped: the driver broke") == 2


def test_a_front_end_that_takes_its_memory_away_harms_only_itself(export: Export) -> None:
    exported = export("null:64M")
    with connected(exported) as frontend:
        frontend.start()
        os.ftruncate(frontend.memory_fd, 0)
        os.eventfd_write(frontend.kick, 1)
        assert frontend.signalled(frontend.error)
        assert frontend.ask(Request.GET_QUEUE_NUM)
    with connected(exported) as frontend:
        frontend.start()
        frontend.submit()
        while not frontend.used():
            assert frontend.signalled(frontend.call)


def test_a_thousand_bad_connections_cost_nothing(export: Export) -> None:
    exported = export("null:64M")
    with connected(exported) as frontend:
        frontend.start()
    wait_until_idle(exported)
    files = exported.open_files()
    dice = random.Random(11)
    for number in range(1000):
        with connected(exported) as frontend, contextlib.suppress(OSError, EOFError):
            if number % 4 == 0:
                frontend.start()
            fds = (frontend.kick, frontend.memory_fd)[: number % 3]
            frontend.send_raw(dice.randbytes(dice.randrange(1, 100)), fds)
            frontend.send(dice.randrange(45), dice.randbytes(8), fds)
    with connected(exported) as frontend:
        frontend.start()
        assert frontend.ask(Request.GET_QUEUE_NUM)
    wait_until_idle(exported)
    assert exported.open_files() == files
    replace(obtain(), driver="virtio-blk-vhost-user").run(exported.socket, ["read 0 4096"])


def test_a_second_front_end_waits_for_the_first_to_go(export: Export) -> None:
    exported = export("null:64M")
    with contextlib.ExitStack() as first_stack:
        first = first_stack.enter_context(connected(exported))
        first.start()
        with connected(exported) as second:
            second.send(Request.GET_FEATURES)
            assert first.ask(Request.GET_QUEUE_NUM)
            assert not second.answered(0.2)
            first_stack.close()
            assert second.receive()[0] == Request.GET_FEATURES
