"""The agent on a real kernel: attach and detach, both buses, resize, refusals, dead workers, restarts."""

from __future__ import annotations

import hashlib
import os
import signal
import struct
import subprocess
from pathlib import Path

import grpc
import pytest

from csi_vduse.agent.kernel import VduseKernel
from csi_vduse.dataplane import device
from csi_vduse.dataplane.device import DeviceSpec
from csi_vduse.proto import agent_pb2
from tests.vm.conftest import CALL_TIMEOUT_S, DEBIAN, MIB, RunningAgent, kill, leaves_nothing, wait_until

VIRTIO = agent_pb2.BUS_VIRTIO_VDPA
VHOST = agent_pb2.BUS_VHOST_VDPA


def attach_request(
    image: Path, volume_id: str = "vol-0123456789abcdef", **changes: object
) -> agent_pb2.AttachRequest:
    fields: dict[str, object] = {
        "volume_id": volume_id,
        "backend": agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(image))),
        "capacity_bytes": image.stat().st_size,
        "bus": VIRTIO,
        **changes,
    }
    return agent_pb2.AttachRequest(**fields)  # type: ignore[arg-type]


def attach(agent: RunningAgent, image: Path, **changes: object) -> agent_pb2.Attachment:
    return agent.stub.Attach(attach_request(image, **changes), timeout=CALL_TIMEOUT_S)


def detach(agent: RunningAgent, volume_id: str = "vol-0123456789abcdef") -> None:
    agent.stub.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=CALL_TIMEOUT_S)


def inspect(agent: RunningAgent, volume_id: str = "vol-0123456789abcdef") -> agent_pb2.InspectResponse:
    return agent.stub.Inspect(agent_pb2.InspectRequest(volume_id=volume_id), timeout=CALL_TIMEOUT_S)


def refused(code: grpc.StatusCode, text: str) -> pytest.RaisesExc[grpc.RpcError]:
    def matches(error: grpc.RpcError) -> bool:
        assert isinstance(error, grpc.Call)
        assert (error.code(), text in (error.details() or "")) == (code, True), str(error)
        return True

    return pytest.RaisesExc(grpc.RpcError, check=matches)


@DEBIAN
def test_bytes_written_to_the_disk_are_in_the_image_after_detach(shared: RunningAgent, image: Path):
    data = os.urandom(4 * MIB)
    with leaves_nothing(shared):
        attachment = attach(shared, image)
        assert attachment.state == agent_pb2.STATE_ATTACHED
        serial = Path(f"/sys/block/{Path(attachment.path).name}/serial").read_text().strip()
        assert serial == "vol-0123456789abcdef"
        with open(attachment.path, "wb") as disk:  # noqa: PTH123 - a device node
            disk.write(data)
            disk.flush()
            os.fsync(disk.fileno())
        stats = {each.operation: each for each in inspect(shared).stats.operations}
        assert stats["write"].bytes >= len(data)
        detach(shared)
    assert hashlib.sha256(image.read_bytes()[: len(data)]).digest() == hashlib.sha256(data).digest()


def test_attaching_again_returns_the_same_and_other_settings_are_refused(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        first = attach(shared, image)
        assert attach(shared, image) == first
        with refused(grpc.StatusCode.ALREADY_EXISTS, "other settings"):
            attach(shared, image, read_only=True)
        detach(shared)
        detach(shared)  # done already is fine


def test_a_disk_for_a_vm_is_never_seen_by_the_block_layer(shared: RunningAgent, image: Path):
    # The partition would be shown by any host that probes the disk: one entry of an MBR, from sector 2048 on.
    with image.open("r+b") as file:
        file.seek(446)
        file.write(struct.pack("<BxxxBxxxII", 0, 0x83, 2048, 8192) + bytes(48) + b"\x55\xaa")
    disks = set(os.listdir("/sys/block"))
    with leaves_nothing(shared):
        attachment = attach(shared, image, bus=VHOST)
        assert Path(attachment.path).name.startswith("vhost-vdpa-")
        assert Path(attachment.path).is_char_device()
        assert set(os.listdir("/sys/block")) == disks
        reads = [each.count for each in inspect(shared).stats.operations if each.operation == "read"]
        assert sum(reads) == 0
        assert Path("/sys/bus/vdpa/drivers_autoprobe").read_text().strip() == "1"
        detach(shared)


def test_the_disk_shows_a_new_capacity_when_resize_returns(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        attachment = attach(shared, image)
        os.truncate(image, 32 * MIB)
        request = agent_pb2.ResizeRequest(volume_id=attachment.volume_id, capacity_bytes=32 * MIB)
        assert shared.stub.Resize(request, timeout=CALL_TIMEOUT_S).capacity_bytes == 32 * MIB
        size = Path(f"/sys/block/{Path(attachment.path).name}/size").read_text()
        assert int(size) * 512 == 32 * MIB
        request.capacity_bytes = 16 * MIB
        with refused(grpc.StatusCode.OUT_OF_RANGE, "shrink"):
            shared.stub.Resize(request, timeout=CALL_TIMEOUT_S)
        detach(shared)


def test_detach_refuses_while_mounted_and_while_held_open(shared: RunningAgent, image: Path, tmp_path: Path):
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True, timeout=120)
    mount_point = tmp_path / "mnt"
    mount_point.mkdir()
    with leaves_nothing(shared):
        path = attach(shared, image).path
        subprocess.run(["mount", path, str(mount_point)], check=True, timeout=120)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, str(mount_point)):
            detach(shared)
        (mount_point / "still-works").write_text("yes")
        subprocess.run(["umount", str(mount_point)], check=True, timeout=120)
        with open(path, "rb"), refused(grpc.StatusCode.FAILED_PRECONDITION, "held open by"):  # noqa: PTH123
            detach(shared)
        assert inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED
        detach(shared)


def test_detach_refuses_while_a_vm_has_the_device(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        path = attach(shared, image, bus=VHOST).path
        fd = os.open(path, os.O_RDWR)
        with refused(grpc.StatusCode.FAILED_PRECONDITION, "held open by"):
            detach(shared)
        os.close(fd)
        detach(shared)


def test_a_foreign_device_of_the_same_name_is_left_alone(shared: RunningAgent, image: Path):
    foreign = DeviceSpec(name="vol-0123456789abcdef", capacity_bytes=MIB)
    device.create_device(foreign)
    try:
        with refused(grpc.StatusCode.ALREADY_EXISTS, "did not make"):
            attach(shared, image)
        assert Path("/dev/vduse/vol-0123456789abcdef").exists()
    finally:
        device.destroy_device(foreign.name)
    with leaves_nothing(shared):
        attach(shared, image)
        detach(shared)


@pytest.mark.parametrize("bus", [VIRTIO, VHOST])
def test_a_worker_that_cannot_open_its_backend_leaves_nothing(
    shared: RunningAgent, image: Path, bus: agent_pb2.Bus
):
    request = attach_request(image, bus=bus)
    request.backend.file.path = str(image.parent / "missing.raw")
    with leaves_nothing(shared):
        with pytest.raises(grpc.RpcError) as caught:
            shared.stub.Attach(request, timeout=CALL_TIMEOUT_S)
        assert "missing.raw" in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"queues": 1000}, "1000"),
        ({"queue_size": 100}, "100"),
        ({"block_size_bytes": 100}, "100"),
        ({"capacity_bytes": 0}, "0"),
        ({"capacity_bytes": 1000}, "1000"),
        ({"volume_id": ""}, "volume id"),
        ({"volume_id": "v" * 300}, "volume id"),
    ],
)
def test_impossible_requests_are_refused_by_name(
    shared: RunningAgent, image: Path, changes: dict[str, object], named: str
):
    with leaves_nothing(shared), refused(grpc.StatusCode.INVALID_ARGUMENT, named):
        attach(shared, image, **changes)


@pytest.mark.parametrize("volume_id", ["../../etc", "a/b", "control", "Ünïcode", "."])
def test_hostile_volume_ids_make_no_paths(shared: RunningAgent, image: Path, volume_id: str):
    with leaves_nothing(shared):
        attachment = attach(shared, image, volume_id=volume_id)
        assert attachment.device_name.startswith("vol-")
        assert Path(f"/dev/vduse/{attachment.device_name}").exists()
        detach(shared, volume_id)


def test_a_worker_that_dies_under_the_kernels_own_reads_is_replaced(shared: RunningAgent, image: Path):
    """udev reads a new disk: killed right after attach, the worker has requests in flight."""
    with leaves_nothing(shared):
        attachment = attach(shared, image)
        kill(attachment.worker_pid)
        victim = attachment.worker_pid
        wait_until(lambda: inspect(shared).attachment.worker_pid not in (0, victim), "replacement")
        assert inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED
        detach(shared)


def test_a_volume_whose_image_is_away_waits_and_goes_on_when_it_is_back(shared: RunningAgent, image: Path):
    with leaves_nothing(shared):
        attachment = attach(shared, image)
        away = image.with_suffix(".away")
        image.rename(away)
        kill(attachment.worker_pid)
        wait_until(
            lambda: "does not exist" in inspect(shared).attachment.state_reason, "report of what is missing"
        )
        assert inspect(shared).attachment.state == agent_pb2.STATE_WORKER_DEAD
        assert "signal 9" in inspect(shared).attachment.state_reason
        read = subprocess.Popen(
            ["dd", f"if={attachment.path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"]
        )
        away.rename(image)
        wait_until(lambda: inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED, "return")
        assert read.wait(60) == 0
        detach(shared)


@DEBIAN
def test_a_device_that_the_kernel_gave_up_is_reported_and_can_be_removed(shared: RunningAgent, image: Path):
    """A worker that does not answer a control message in time loses its device for good."""
    with leaves_nothing(shared):
        attachment = attach(shared, image, bus=VHOST)
        Path(f"/sys/class/vduse/{attachment.device_name}/msg_timeout").write_text("1")
        os.kill(attachment.worker_pid, signal.SIGSTOP)
        with pytest.raises(OSError, match=attachment.path):
            os.close(os.open(attachment.path, os.O_RDWR))  # an opener begins with a reset
        os.kill(attachment.worker_pid, signal.SIGCONT)
        wait_until(
            lambda: inspect(shared).attachment.state == agent_pb2.STATE_BROKEN, "report of the breakage"
        )
        assert "attach it again" in inspect(shared).attachment.state_reason
        with refused(grpc.StatusCode.UNAVAILABLE, "broken"):
            attach(shared, image, bus=VHOST)
        detach(shared)
        attach(shared, image, bus=VHOST)
        detach(shared)


def test_a_device_that_the_kernel_gave_up_while_its_worker_was_dead_can_be_removed(
    shared: RunningAgent, image: Path
):
    """The agent is held, so that nobody answers the reset in time."""
    with leaves_nothing(shared):
        attachment = attach(shared, image)
        Path(f"/sys/class/vduse/{attachment.device_name}/msg_timeout").write_text("1")
        virtio = Path(f"/sys/block/{Path(attachment.path).name}/device").resolve().name
        # It reads every new disk; a read that nobody answers would hold the unbind up.
        subprocess.run(["udevadm", "settle"], check=True, timeout=120)
        os.kill(shared.child_pid(), signal.SIGSTOP)
        try:
            kill(attachment.worker_pid)
            Path("/sys/bus/virtio/drivers/virtio_blk/unbind").write_text(virtio)
        finally:
            os.kill(shared.child_pid(), signal.SIGCONT)
        wait_until(lambda: inspect(shared).attachment.state == agent_pb2.STATE_BROKEN, "report")
        detach(shared)


def test_an_export_without_the_rights_says_so():
    denied = subprocess.run(
        ["setpriv", "--bounding-set=-all", "csi-vduse", "export", "--backend=null:16M", "denied"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert denied.returncode == 1
    assert "CAP_NET_ADMIN" in denied.stderr
    assert "Traceback" not in denied.stderr


def test_the_driver_outlives_its_agent(own: RunningAgent, image: Path):
    """The agent is killed; the worker serves on, and the agent that the spawner starts takes it over."""
    before = attach(own, image)
    old_agent = own.child_pid()
    kill(old_agent)
    with open(before.path, "r+b") as disk:  # noqa: PTH123 - a device node
        disk.write(b"written while no agent ran")
    own.wait_until_ready()
    assert own.child_pid() != old_agent
    assert inspect(own).attachment.worker_pid == before.worker_pid
    detach(own)
    assert image.read_bytes().startswith(b"written while no agent ran")


def test_a_stopped_agent_leaves_workers_serving_for_the_next(own: RunningAgent, image: Path):
    before = attach(own, image)
    assert own.stop() == 0
    with open(before.path, "rb") as disk:  # noqa: PTH123 - a device node
        assert disk.read(512) == bytes(512)
    own.start()
    assert inspect(own).attachment.worker_pid == before.worker_pid
    detach(own)
    assert "vol-0123456789abcdef" not in os.listdir("/sys/class/vduse")


def test_an_attach_cut_short_by_a_kill_is_undone_by_the_next_agent(own: RunningAgent, image: Path):
    """As if killed between CREATE_DEV and the bus: a record says attaching, and a device exists."""
    attachment = attach(own, image)
    record = own.run_dir / "volumes" / attachment.device_name / "record.json"
    text = record.read_text()
    own.stop()
    record.write_text(text.replace('"attached"', '"attaching"'))
    own.start()
    wait_until(lambda: not Path(f"/sys/class/vduse/{attachment.device_name}").exists(), "undo")
    assert not record.exists()


def test_a_second_agent_on_the_same_directory_is_refused(own: RunningAgent):
    second = subprocess.run(
        ["csi-vduse", "agent", "--run-dir", str(own.run_dir)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert second.returncode == 1
    assert "another agent uses" in second.stderr


def test_a_stale_socket_is_replaced(own: RunningAgent):
    own.process.send_signal(signal.SIGSTOP)  # or it would start another agent
    kill(own.child_pid())
    kill(own.process.pid)
    own.process.wait(60)
    wait_until(lambda: not _somebody_listens(own), "end of the agent")
    assert (own.run_dir / "agent.sock").exists()
    own.start()


def _somebody_listens(agent: RunningAgent) -> bool:
    return str(agent.run_dir / "agent.sock") in Path("/proc/net/unix").read_text()


def test_without_the_bus_driver_attach_says_which_module_to_load(shared: RunningAgent, image: Path):
    subprocess.run(["modprobe", "-r", "vhost_vdpa"], check=True, timeout=60)
    try:
        with leaves_nothing(shared), refused(grpc.StatusCode.FAILED_PRECONDITION, "vhost_vdpa is not loaded"):
            attach(shared, image, bus=VHOST)
    finally:
        subprocess.run(["modprobe", "vhost_vdpa"], check=True, timeout=60)


@DEBIAN
def test_autoprobe_is_mended_after_a_helper_was_killed(shared: RunningAgent, image: Path):
    switch, marker = Path("/sys/bus/vdpa/drivers_autoprobe"), shared.run_dir / "autoprobe-off"
    marker.touch()
    switch.write_text("0")
    attach(shared, image)
    detach(shared)
    assert switch.read_text().strip() == "1"
    assert not marker.exists()


@DEBIAN
async def test_the_kernel_refuses_what_the_fake_kernel_refuses():
    kernel = VduseKernel(destroy_timeout_s=0.2)
    spec = DeviceSpec(name="twin", capacity_bytes=MIB)
    await kernel.create(spec)
    try:
        with pytest.raises(device.AlreadyExists):
            await kernel.create(spec)
        fd = kernel.open("twin")
        with pytest.raises(device.Unavailable):
            kernel.open("twin")
        with pytest.raises(device.FailedPrecondition):
            await kernel.destroy("twin")
        os.close(fd)
    finally:
        await kernel.destroy("twin")
    await kernel.destroy("twin")
