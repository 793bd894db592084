"""The part of the power-cut test that runs in the machine whose power is cut.

    python -m tests.chaos.host.guest write CYCLE          until the power goes
    python -m tests.chaos.host.guest check CYCLE FLUSHED FILES

The pool is an ext4 on the machine's disk. In it: an image for ordered writes, new in each cycle, and one with an ext4
that lives through all of them. `write` prints `flushed EPOCH` and `file NUMBER` when these are safe, so that
whoever reads it knows what has to be there afterwards.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

from csi_vduse.proto import agent_pb2
from lab.machine import Machine
from lab.paths import CHECKOUT
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, MODULES, RunningAgent
from tests.vm.exports import tool

POOL = Path("/mnt/pool")
FILES = Path("/mnt/files")
ORDERED_BYTES = 16 * MIB
FILES_BYTES = 192 * MIB
_PROGRAM = CHECKOUT / ".cache/chaos/ordered"
_FILE_BYTES = 20_000


def content_of(number: int) -> bytes:
    """What file NUMBER holds."""
    return hashlib.shake_256(str(number).encode()).digest(_FILE_BYTES)


def write(cycle: int) -> None:
    """Write until the power goes."""
    if cycle == 0:
        tool("mkfs.ext4", "-q", Machine.DISK)
    with ExitStack() as stack:
        agent = _begin(stack)
        ordered = attach(agent, f"ordered-{cycle}", ORDERED_BYTES, packed=cycle % 2 == 1)
        files = attach(agent, "files", FILES_BYTES)
        if cycle == 0:
            tool("mkfs.ext4", "-q", files)
        FILES.mkdir(exist_ok=True)
        tool("mount", files, FILES)
        seed = str(int.from_bytes(os.urandom(4), "big"))
        stack.enter_context(subprocess.Popen([_PROGRAM, "write", ordered, str(ORDERED_BYTES), seed]))
        first = 1 + max((int(path.name) for path in FILES.glob("[0-9]*")), default=0)
        for number in itertools.count(first):
            _keep(number)
            os.write(
                1, f"file {number}\n".encode()
            )  # one write: the other writer's lines come between otherwise


def _keep(number: int) -> None:
    """Write a file and make it safe, its name too; a few old ones go."""
    with (FILES / str(number)).open("wb") as file:
        file.write(content_of(number))
        file.flush()
        os.fsync(file.fileno())
    folder = os.open(FILES, os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


def check(cycle: int, flushed: int, files_count: int) -> None:
    """Look at what is there after the cut, and leave it all clean."""
    with ExitStack() as stack:
        agent = _begin(stack)
        ordered = attach(agent, f"ordered-{cycle}", ORDERED_BYTES)
        print(tool(_PROGRAM, "check", ordered, str(ORDERED_BYTES), str(flushed)), flush=True)
        files = attach(agent, "files", FILES_BYTES)
        FILES.mkdir(exist_ok=True)
        tool("mount", files, FILES)
        for number in range(1, files_count + 1):
            assert (FILES / str(number)).read_bytes() == content_of(number), (
                f"file {number} is not what was kept"
            )
        tool("umount", FILES)
        tool("e2fsck", "-fn", files)
        for volume_id in (f"ordered-{cycle}", "files"):
            agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=CALL_TIMEOUT_S)
        assert agent.stop() == 0
        (POOL / f"ordered-{cycle}").unlink()
        tool("umount", POOL)
        tool("e2fsck", "-fn", Machine.DISK)
        print(f"right: {files_count} files, epoch {flushed}")


def _begin(stack: ExitStack) -> RunningAgent:
    tool("modprobe", "--all", *MODULES)
    POOL.mkdir(exist_ok=True)
    tool("mount", Machine.DISK, POOL)
    run_dir = Path("/run/cut")
    run_dir.mkdir(exist_ok=True)
    agent = RunningAgent(run_dir)
    agent.start()
    stack.callback(agent.process.kill)
    return agent


def attach(agent: RunningAgent, volume_id: str, size_bytes: int, *, packed: bool = False) -> Path:
    """Attach an image of the pool, made if there is none; returns the disk."""
    image = POOL / volume_id
    if not image.exists():
        with image.open("wb") as file:
            file.truncate(size_bytes)
        os.sync()
    request = agent_pb2.AttachRequest(
        volume_id=volume_id,
        backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image))),
        capacity_bytes=size_bytes,
        bus=agent_pb2.BUS_VIRTIO_VDPA,
        packed=packed,
    )
    return Path(agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path)


if __name__ == "__main__":
    {"write": write, "check": check}[sys.argv[1]](*map(int, sys.argv[2:]))
