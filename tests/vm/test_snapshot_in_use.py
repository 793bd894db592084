"""A snapshot and a clone of a volume that is being written are one moment of it, not a mixture of two."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import random
from multiprocessing.synchronize import Event
from pathlib import Path

import grpc

from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from tests.vm.test_sanity import standalone

MIB = 1 << 20
BLOCK_BYTES = 4096
BLOCKS = 256
SPACING_BYTES = 64 << 10  # far apart: a copy needs a while from the first to the last
# Not the order of a copy: else a copy made beside the writer would look like a moment too.
ORDER = random.Random(7).sample(range(BLOCKS), BLOCKS)
ROUNDS = 2
TIMEOUT_S = 300


def write_generations(device: str, running: Event, stop: Event) -> None:
    """Write generation 1, 2, 3 ... to all blocks, one after the other, each on the disk before the next."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    buffer = mmap.mmap(-1, BLOCK_BYTES)
    generation = 1
    while not stop.is_set():
        buffer[:8] = generation.to_bytes(8, "little")
        for block in ORDER:
            os.pwrite(fd, buffer, block * SPACING_BYTES)
        running.set()
        generation += 1
    os.close(fd)


def generations(image: Path) -> list[int]:
    """Return the generation of every block, in the order in which they are written."""
    with image.open("rb") as file:
        return [
            int.from_bytes(os.pread(file.fileno(), 8, block * SPACING_BYTES), "little") for block in ORDER
        ]


def test_copies_of_a_written_volume_are_one_moment_of_it(tmp_path: Path) -> None:
    writer = csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)
    block = csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=writer)
    size = csi_pb2.CapacityRange(required_bytes=BLOCKS * SPACING_BYTES)
    staging, target = str(tmp_path / "staging"), str(tmp_path / "target")
    Path(staging).mkdir()
    context = multiprocessing.get_context("spawn")
    running, stop = context.Event(), context.Event()
    with standalone(tmp_path) as endpoint, grpc.insecure_channel(f"unix:{endpoint}") as channel:
        controller, node = csi_pb2_grpc.ControllerStub(channel), csi_pb2_grpc.NodeStub(channel)
        request = csi_pb2.CreateVolumeRequest(name="v", capacity_range=size, volume_capabilities=[block])
        volume = controller.CreateVolume(request, timeout=TIMEOUT_S).volume
        where = {"volume_id": volume.volume_id, "staging_target_path": staging}
        node.NodeStageVolume(
            csi_pb2.NodeStageVolumeRequest(**where, volume_capability=block), timeout=TIMEOUT_S
        )
        node.NodePublishVolume(
            csi_pb2.NodePublishVolumeRequest(**where, volume_capability=block, target_path=target),
            timeout=TIMEOUT_S,
        )
        process = context.Process(target=write_generations, args=(target, running, stop), daemon=True)
        process.start()
        assert running.wait(TIMEOUT_S)
        copies = []
        for number in range(ROUNDS):
            snapshot = controller.CreateSnapshot(
                csi_pb2.CreateSnapshotRequest(source_volume_id=volume.volume_id, name=f"s{number}"),
                timeout=TIMEOUT_S,
            ).snapshot
            assert snapshot.ready_to_use
            copies.append(tmp_path / "pool/snapshots" / snapshot.snapshot_id / "image.raw")
            running.clear()
            assert running.wait(TIMEOUT_S), "the volume does not go on after a copy"
        request = csi_pb2.CreateVolumeRequest(name="clone", capacity_range=size, volume_capabilities=[block])
        request.volume_content_source.volume.volume_id = volume.volume_id
        clone = controller.CreateVolume(request, timeout=TIMEOUT_S).volume
        copies.append(tmp_path / "pool/volumes" / clone.volume_id / "image.raw")
        stop.set()
        process.join(TIMEOUT_S)
        assert process.exitcode == 0, "the writer saw an error"
        unpublish = csi_pb2.NodeUnpublishVolumeRequest(volume_id=volume.volume_id, target_path=target)
        node.NodeUnpublishVolume(unpublish, timeout=TIMEOUT_S)
        node.NodeUnstageVolume(csi_pb2.NodeUnstageVolumeRequest(**where), timeout=TIMEOUT_S)
        found = [generations(copy) for copy in copies]
    for one in found:
        # Some blocks have the newest generation, all after them the one before: a moment between two writes.
        assert one == sorted(one, reverse=True)
        assert one[0] - one[-1] in {0, 1}
    assert [one[0] for one in found] == sorted(one[0] for one in found)
    assert found[0][0] < found[-1][0], "the writer wrote nothing between the copies"
