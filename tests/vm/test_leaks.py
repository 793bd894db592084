"""Attachments come and go, twenty at a time, and nothing of them stays: not even memory."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, leaves_nothing, wait_until

CYCLES = 160
# The kernel makes and removes one device at a time, so that the last of many waits for all.
QUEUED_TIMEOUT_S = 3 * CALL_TIMEOUT_S
AT_ONCE = 20
ROUNDS = CYCLES // AT_ONCE
# Allocators take memory in leaps and keep it: a round may grow by a lot. What leaks grows in every round.
LEAK_BYTES = 8192


def memory_bytes(pid: int) -> int:
    """Memory that belongs to this process alone."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Private_Dirty:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"no Private_Dirty of {pid}")


def descriptors(pid: int) -> int:
    return len(os.listdir(f"/proc/{pid}/fd"))


def generic_netlink_sockets() -> int:
    """Of the whole machine, which has no other user of that protocol; udev's sockets are of another one."""
    lines = Path("/proc/net/netlink").read_text().splitlines()
    return sum(line.split()[1] == "16" for line in lines)  # NETLINK_GENERIC


def children(pid: int) -> int:
    return len(Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def cycle(agent: RunningAgent, image: Path, number: int) -> None:
    """Attach, write and read back, detach."""
    volume_id = f"leak-{number}"
    request = agent_pb2.AttachRequest(
        volume_id=volume_id,
        backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image))),
        capacity_bytes=image.stat().st_size,
        bus=agent_pb2.BUS_VHOST_VDPA if number % 4 == 3 else agent_pb2.BUS_VIRTIO_VDPA,
    )
    attachment = agent.stub.Attach(request, timeout=QUEUED_TIMEOUT_S)
    if attachment.bus == agent_pb2.BUS_VIRTIO_VDPA:
        data = hashlib.sha256(volume_id.encode()).digest() * 128
        fd = os.open(attachment.path, os.O_RDWR | os.O_SYNC)
        try:
            os.pwrite(fd, data, number * 4096)
        finally:
            os.close(fd)
        with image.open("rb") as file:
            assert os.pread(file.fileno(), len(data), number * 4096) == data
    agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=QUEUED_TIMEOUT_S)


def test_many_cycles_leave_nothing_behind(shared: RunningAgent, tmp_path: Path):
    images = []
    for number in range(AT_ONCE):
        images.append(tmp_path / f"{number}.raw")
        with images[-1].open("wb") as file:
            file.truncate(4 * MIB)
    processes = {"spawner": shared.process.pid, "agent": shared.child_pid()}

    def one_round(first: int) -> None:
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for future in [pool.submit(cycle, shared, images[n], first + n) for n in range(AT_ONCE)]:
                future.result()

    with leaves_nothing(shared):
        one_round(
            0
        )  # what is allocated once, such as caches and thread pools, is there after the first round
        # A detach has seen its worker's end, which the spawner reaps a moment later.
        wait_until(lambda: children(shared.process.pid) == 1, "end of all workers")
        before = {name: (descriptors(pid), children(pid)) for name, pid in processes.items()}
        memory = {name: [memory_bytes(pid)] for name, pid in processes.items()}
        sockets = generic_netlink_sockets()
        for number in range(1, ROUNDS):
            one_round(number * AT_ONCE)
            for name, pid in processes.items():
                memory[name].append(memory_bytes(pid))
    wait_until(lambda: children(shared.process.pid) == 1, "end of all workers")
    for name, pid in processes.items():
        assert (descriptors(pid), children(pid)) == before[name], name
        grown = [after - earlier for earlier, after in itertools.pairwise(memory[name])]
        assert min(grown) < LEAK_BYTES * AT_ONCE, (name, memory[name])
    assert generic_netlink_sockets() == sockets
    zombies = subprocess.run(["ps", "-eo", "stat,comm"], capture_output=True, text=True, check=True).stdout
    assert not [line for line in zombies.splitlines() if line.startswith("Z") and "csi-vduse" in line]
