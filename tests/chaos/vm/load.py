"""Volumes under load: fio writes, reads, flushes and discards with checksums, on raw disks and on ext4.

Kept true: what fio was told was written is read back and compared while the load runs, and again at its end; a file
system is checked by e2fsck after it was unmounted; one error seen by any job fails the test.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, MIB, RunningAgent, wait_until
from tests.vm.exports import tool

VOLUME_BYTES = 48 * MIB
BEGIN_TIMEOUT_S = 300
END_TIMEOUT_S = 600
ENOUGH_BYTES = 256 * 1024


@dataclass(frozen=True)
class Shape:
    """How a volume is used."""

    queues: int
    packed: bool
    ext4: bool


SHAPES = (Shape(1, False, False), Shape(2, False, True), Shape(1, True, True), Shape(2, True, False))


@dataclass(frozen=True)
class Volume:
    """An attached volume of a test; `target` is what the load is put on: the disk, or a file system on it."""

    id: str
    shape: Shape
    image: Path
    disk: Path
    target: Path


def attach_request(
    volume_id: str, backend: agent_pb2.Backend, shape: Shape, size_bytes: int = VOLUME_BYTES
) -> agent_pb2.AttachRequest:
    return agent_pb2.AttachRequest(
        volume_id=volume_id,
        backend=backend,
        capacity_bytes=size_bytes,
        bus=agent_pb2.BUS_VIRTIO_VDPA,
        queues=shape.queues,
        packed=shape.packed,
    )


def file_backend(image: Path) -> agent_pb2.Backend:
    return agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image)))


def make_image(path: Path, size_bytes: int = VOLUME_BYTES) -> Path:
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return path


@contextlib.contextmanager
def attached(agent: RunningAgent, folder: Path, shapes: Sequence[Shape] = SHAPES) -> Iterator[list[Volume]]:
    """Volumes of these shapes, attached and, where they are to have a file system, mounted; checked at the end."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(one_attached(agent, folder, f"chaos-{number}", shape))
            for number, shape in enumerate(shapes)
        ]


@contextlib.contextmanager
def one_attached(
    agent: RunningAgent, folder: Path, volume_id: str, shape: Shape, image: Path | None = None
) -> Iterator[Volume]:
    """The same for one volume, which may have an image of its own."""
    try:
        volume = attach(agent, folder, volume_id, shape, image)
        yield volume
        give_back(agent, volume)
    except BaseException:
        _take_away(agent, folder, volume_id)
        raise


def attach(
    agent: RunningAgent, folder: Path, volume_id: str, shape: Shape, image: Path | None = None
) -> Volume:
    image = image or make_image(folder / f"{volume_id}.raw")
    request = attach_request(volume_id, file_backend(image), shape, image.stat().st_size)
    disk = Path(agent.stub.Attach(request, timeout=CALL_TIMEOUT_S).path)
    if not shape.ext4:
        return Volume(volume_id, shape, image, disk, disk)
    point = folder / f"{volume_id}.mnt"
    point.mkdir()
    tool("mkfs.ext4", "-q", disk)
    tool("mount", "-o", "discard,errors=remount-ro", disk, point)
    return Volume(volume_id, shape, image, disk, point)


def give_back(agent: RunningAgent, volume: Volume) -> None:
    """Unmount, check the file system on the disk, detach, and check it again in the image."""
    if volume.shape.ext4:
        tool("umount", volume.target)
        tool("e2fsck", "-fn", volume.disk)
    agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume.id), timeout=CALL_TIMEOUT_S)
    if volume.shape.ext4:
        tool("e2fsck", "-fn", volume.image)


def _take_away(agent: RunningAgent, folder: Path, volume_id: str) -> None:
    """After a failure: as much as goes, so that the next test has a chance."""
    with contextlib.suppress(Exception):
        subprocess.run(["umount", folder / f"{volume_id}.mnt"], check=False, timeout=60)
        agent.disconnect()
        agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=60)


class Load:
    """A running fio."""

    def __init__(self, volumes: Sequence[Volume], folder: Path, seed: int) -> None:
        # Two emulated processors: the load takes what agents and workers that start leave of them.
        argv = ["nice", "-n15", "fio", "--ioengine=libaio", "--direct=1", "--iodepth=16"]
        argv += ["--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0", "--verify_backlog=64"]
        argv += ["--time_based", "--runtime=7200", "--output-format=json", f"--output={folder}/fio.json"]
        argv += ["--exitall_on_error", "--group_reporting=0"]
        jobs = [job for number, volume in enumerate(volumes) for job in _jobs(volume, seed + number)]
        argv += [word for job in jobs for word in job]
        self._jobs = len(jobs)
        self._report = folder / "fio.json"
        self._said = (folder / "fio.log").open("wb+")
        self._process = subprocess.Popen(
            argv, stdout=self._said, stderr=self._said, cwd="/tmp", start_new_session=True
        )

    def begin(self) -> None:
        """Wait until every job writes, which they do when their files are laid out."""
        wait_until(self._all_write, "writing of all jobs", BEGIN_TIMEOUT_S)

    def _all_write(self) -> bool:
        self.goes_on()
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children").read_text().split()
        written = [_written_bytes(int(child)) for child in children]
        return len(written) == self._jobs and min(written) > ENOUGH_BYTES

    def goes_on(self) -> None:
        """Fail if it has ended, which it does at an error only."""
        assert self._process.poll() is None, self._text()

    def end(self) -> None:
        """Let it end, and look at what it has to say."""
        self.goes_on()
        self._process.terminate()
        self._process.wait(END_TIMEOUT_S)
        text = self._report.read_text()
        jobs = json.loads(text[text.index("{") : text.rindex("}") + 1])["jobs"]
        said = self._text()
        assert jobs
        for job in jobs:
            assert job["error"] == 0, (job["jobname"], job["error"], said)
            assert job["write"]["total_ios"] > 0, job["jobname"]
        assert "verify:" not in said, said
        assert "bad " not in said, said

    def kill(self) -> None:
        """End it and its jobs, whatever they do; waits until they have let go of the disks."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._said.close()

    def _text(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")


def _written_bytes(pid: int) -> int:
    """What a process has had written to disks (proc_pid_io(5)); 0 if it has ended."""
    try:
        text = Path(f"/proc/{pid}/io").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return int(text.partition("\nwrite_bytes: ")[2].split()[0])


def _jobs(volume: Volume, seed: int) -> list[list[str]]:
    """What is done to a volume: reads, writes and flushes on a file system; on a raw disk discards too.

    On a raw disk each queue has a job, in a part of the disk of its own, and one more job discards what it then writes.
    """
    mix = ["--rw=randrw", "--rwmixread=30", "--bsrange=4k-32k", "--fsync=32", "--size=8M"]
    if volume.shape.ext4:
        mix += [f"--randseed={seed}", "--nrfiles=2", "--fallocate=none"]
        return [[f"--name={volume.id}", f"--directory={volume.target}", *mix]]
    jobs = []
    for queue in range(volume.shape.queues):
        where = [f"--filename={volume.target}", f"--offset={queue * 8}M"]
        jobs.append([f"--name={volume.id}-{queue}", *where, *mix, f"--randseed={seed + queue}"])
    where = [f"--filename={volume.target}", "--offset=24M", "--size=8M", f"--randseed={seed}"]
    return [
        *jobs,
        [f"--name={volume.id}-discard", *where, "--rw=trimwrite", "--bsrange=4k-32k", "--fsync=32"],
    ]


@contextlib.contextmanager
def under_load(volumes: Sequence[Volume], folder: Path, seed: int) -> Iterator[Load]:
    """Load on these volumes while the body runs; it has to be without an error to its end."""
    load = Load(volumes, folder, seed)
    try:
        load.begin()
        yield load
        load.end()
    finally:
        load.kill()
