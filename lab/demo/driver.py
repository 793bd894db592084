"""`csi-vduse standalone` as a process, and the calls to it that an orchestrator would make.

What is kept true: everything goes through the sockets that users have, CSI and agent.proto; nothing of the
driver is imported but its generated messages.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc

from csi_vduse.proto import agent_pb2, agent_pb2_grpc, csi_pb2, csi_pb2_grpc
from lab.demo import look
from lab.errors import CommandFailed, LabError
from lab.host import run as run_on_host
from lab.host import tail

POOL = "demo"
METRICS_ADDRESS = "127.0.0.1:9747"
_CALL_S = 180.0
_START_S = 180.0
_STOP_S = 60.0
_SCRATCH = Path("/mnt/scratch")
_LOG_LINES = 30


@dataclass(frozen=True)
class Places:
    """Where this demo keeps things; `run` is on tmpfs, `pool` has room."""

    run: Path
    pool: Path

    @property
    def log(self) -> Path:
        """What the driver prints."""
        return self.run / "driver.log"

    def image(self, volume_id: str) -> Path:
        """The image file of a volume in the pool."""
        return self.pool / "volumes" / volume_id / "image.raw"


@dataclass(frozen=True)
class Use:
    """A volume as one pod has it."""

    volume_id: str
    capability: csi_pb2.VolumeCapability
    staging: Path
    target: Path


class Driver:
    """A running driver."""

    def __init__(self, places: Places, process: subprocess.Popen[bytes], channel: grpc.Channel) -> None:
        """Only `running` makes one."""
        self.places = places
        self.process = process
        self.identity = csi_pb2_grpc.IdentityStub(channel)
        self._controller = csi_pb2_grpc.ControllerStub(channel)
        self._node = csi_pb2_grpc.NodeStub(channel)
        self._agent_channel = grpc.insecure_channel(f"unix:{places.run}/agent/agent.sock")
        self._agent = agent_pb2_grpc.AgentStub(self._agent_channel)

    def create(
        self,
        name: str,
        size_bytes: int,
        capability: csi_pb2.VolumeCapability,
        *,
        snapshot_id: str = "",
        volume_id: str = "",
    ) -> csi_pb2.Volume:
        """CreateVolume: blank, or filled from a snapshot or a volume."""
        source = None
        if snapshot_id:
            origin = csi_pb2.VolumeContentSource.SnapshotSource(snapshot_id=snapshot_id)
            source = csi_pb2.VolumeContentSource(snapshot=origin)
        elif volume_id:
            other = csi_pb2.VolumeContentSource.VolumeSource(volume_id=volume_id)
            source = csi_pb2.VolumeContentSource(volume=other)
        request = csi_pb2.CreateVolumeRequest(
            name=name,
            capacity_range=csi_pb2.CapacityRange(required_bytes=size_bytes),
            volume_capabilities=[capability],
            parameters={"pool": POOL},
            volume_content_source=source,
        )
        return self._controller.CreateVolume(request, timeout=_CALL_S).volume

    def delete(self, volume_id: str) -> None:
        """DeleteVolume."""
        self._controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id), timeout=_CALL_S)

    def snapshot(self, name: str, volume_id: str) -> csi_pb2.Snapshot:
        """CreateSnapshot."""
        request = csi_pb2.CreateSnapshotRequest(name=name, source_volume_id=volume_id)
        return self._controller.CreateSnapshot(request, timeout=_CALL_S).snapshot

    def delete_snapshot(self, snapshot_id: str) -> None:
        """DeleteSnapshot."""
        request = csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot_id)
        self._controller.DeleteSnapshot(request, timeout=_CALL_S)

    def listed(self) -> list[str]:
        """The ids of all volumes and snapshots."""
        volumes = self._controller.ListVolumes(csi_pb2.ListVolumesRequest(), timeout=_CALL_S)
        snapshots = self._controller.ListSnapshots(csi_pb2.ListSnapshotsRequest(), timeout=_CALL_S)
        return [one.volume.volume_id for one in volumes.entries] + [
            one.snapshot.snapshot_id for one in snapshots.entries
        ]

    def use(self, volume_id: str, capability: csi_pb2.VolumeCapability, pod: str) -> Use:
        """NodeStageVolume and NodePublishVolume, with the folders that a kubelet makes."""
        staging = self.places.run / "staging" / volume_id
        target = self.places.run / "pods" / pod / "data"
        staging.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        self._node.NodeStageVolume(
            csi_pb2.NodeStageVolumeRequest(
                volume_id=volume_id, staging_target_path=str(staging), volume_capability=capability
            ),
            timeout=_CALL_S,
        )
        self._node.NodePublishVolume(
            csi_pb2.NodePublishVolumeRequest(
                volume_id=volume_id,
                staging_target_path=str(staging),
                target_path=str(target),
                volume_capability=capability,
            ),
            timeout=_CALL_S,
        )
        return Use(volume_id, capability, staging, target)

    def end_use(self, use: Use) -> None:
        """NodeUnpublishVolume and NodeUnstageVolume."""
        self._node.NodeUnpublishVolume(
            csi_pb2.NodeUnpublishVolumeRequest(volume_id=use.volume_id, target_path=str(use.target)),
            timeout=_CALL_S,
        )
        self._node.NodeUnstageVolume(
            csi_pb2.NodeUnstageVolumeRequest(volume_id=use.volume_id, staging_target_path=str(use.staging)),
            timeout=_CALL_S,
        )

    def expand(self, use: Use, size_bytes: int) -> int:
        """ControllerExpandVolume, then NodeExpandVolume; the new capacity in bytes."""
        size = csi_pb2.CapacityRange(required_bytes=size_bytes)
        self._controller.ControllerExpandVolume(
            csi_pb2.ControllerExpandVolumeRequest(volume_id=use.volume_id, capacity_range=size),
            timeout=_CALL_S,
        )
        request = csi_pb2.NodeExpandVolumeRequest(
            volume_id=use.volume_id,
            volume_path=str(use.target),
            staging_target_path=str(use.staging),
            capacity_range=size,
            volume_capability=use.capability,
        )
        return self._node.NodeExpandVolume(request, timeout=_CALL_S).capacity_bytes

    def attachment(self, volume_id: str) -> agent_pb2.Attachment:
        """What the agent knows of an attached volume."""
        request = agent_pb2.InspectRequest(volume_id=volume_id)
        return self._agent.Inspect(request, timeout=_CALL_S).attachment

    def attach_for_vm(self, volume_id: str, capacity_bytes: int) -> agent_pb2.Attachment:
        """Have the agent give a volume's image to vhost_vdpa."""
        request = agent_pb2.AttachRequest(
            volume_id=volume_id,
            backend=agent_pb2.Backend(file=agent_pb2.FileBackend(path=str(self.places.image(volume_id)))),
            capacity_bytes=capacity_bytes,
            bus=agent_pb2.BUS_VHOST_VDPA,
        )
        return self._agent.Attach(request, timeout=_CALL_S)

    def detach(self, volume_id: str) -> None:
        """Have the agent take a volume away."""
        self._agent.Detach(agent_pb2.DetachRequest(volume_id=volume_id), timeout=_CALL_S)

    def clean_up(self) -> None:
        """After a failed demo: unmount and detach all that there is, so that a host stays as it was."""
        for mount in reversed(look.mounts(self.places.run)):
            run_on_host(["umount", mount], timeout_s=_CALL_S)
        for at in self._agent.List(agent_pb2.ListRequest(), timeout=_CALL_S).attachments:
            self.detach(at.volume_id)

    def stop(self) -> int:
        """SIGTERM, as a container runtime does; the exit code."""
        self._agent_channel.close()
        self.process.terminate()
        return self.process.wait(_STOP_S)


def block() -> csi_pb2.VolumeCapability:
    """A raw block device for one writer."""
    return csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=_access_mode())


def filesystem(name: str) -> csi_pb2.VolumeCapability:
    """A file system for one writer."""
    mount = csi_pb2.VolumeCapability.MountVolume(fs_type=name)
    return csi_pb2.VolumeCapability(mount=mount, access_mode=_access_mode())


def _access_mode() -> csi_pb2.VolumeCapability.AccessMode:
    return csi_pb2.VolumeCapability.AccessMode(mode=csi_pb2.VolumeCapability.AccessMode.SINGLE_NODE_WRITER)


@contextlib.contextmanager
def running() -> Iterator[Driver]:
    """Start the driver; give it when it says that it is ready; end it and remove its folders afterwards.

    Raises CommandFailed, with the end of its log, when it does not start.
    """
    with contextlib.ExitStack() as undo:
        run = Path(tempfile.mkdtemp(prefix="csi-vduse-demo-", dir="/run"))
        undo.callback(shutil.rmtree, run, ignore_errors=True)
        pool = Path(tempfile.mkdtemp(prefix="demo-pool-", dir=_SCRATCH if _SCRATCH.is_mount() else run))
        undo.callback(shutil.rmtree, pool, ignore_errors=True)
        places = Places(run, pool)
        endpoint = f"unix://{run}/csi.sock"
        argv = [str(Path(sys.executable).parent / "csi-vduse"), "standalone"]
        argv += ["--endpoint", endpoint, "--node-id", os.uname().nodename]
        argv += ["--state-dir", f"{run}/state", "--run-dir", f"{run}/agent"]
        argv += ["--pool", f"{POOL}=file:{pool}", "--metrics-address", METRICS_ADDRESS]
        with places.log.open("wb") as output:
            process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
        undo.callback(_end, process)
        channel = undo.enter_context(grpc.insecure_channel(f"unix:{run}/csi.sock"))
        driver = Driver(places, process, channel)
        _wait_until_ready(driver)
        try:
            yield driver
        except BaseException:
            print(f"\nThe end of the driver's log:\n{tail(places.log, _LOG_LINES)}", flush=True)
            with contextlib.suppress(grpc.RpcError, LabError):
                driver.clean_up()
            raise


def _wait_until_ready(driver: Driver) -> None:
    deadline = time.monotonic() + _START_S
    while driver.process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(grpc.RpcError):
            answer = driver.identity.Probe(csi_pb2.ProbeRequest(), wait_for_ready=True, timeout=5)
            if answer.ready.value:
                return
    log = tail(driver.places.log, _LOG_LINES)
    raise CommandFailed(f"csi-vduse standalone is not ready; the end of its log:\n{log}")


def _end(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        process.kill()
        process.wait()
