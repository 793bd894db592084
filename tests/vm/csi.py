"""A whole driver in the VM, and short forms of the CSI calls that tests make of it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest

from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from tests.vm.test_sanity import standalone

MIB = 1 << 20
CALL_TIMEOUT_S = 400
Mode = csi_pb2.VolumeCapability.AccessMode
READER = Mode.SINGLE_NODE_READER_ONLY


def mount(fs_type: str, mode: Mode.Mode = Mode.SINGLE_NODE_WRITER, *flags: str) -> csi_pb2.VolumeCapability:
    wanted = csi_pb2.VolumeCapability.MountVolume(fs_type=fs_type, mount_flags=flags)
    return csi_pb2.VolumeCapability(mount=wanted, access_mode=Mode(mode=mode))


def block(mode: Mode.Mode = Mode.SINGLE_NODE_WRITER) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(block=csi_pb2.VolumeCapability.BlockVolume(), access_mode=Mode(mode=mode))


@dataclass(frozen=True)
class Volume:
    """A volume that a test made."""

    id: str
    name: str


class Driver:
    """Calls of one running driver. Paths: staging/NAME and pods/NAME below the directory."""

    def __init__(self, directory: Path, channel: grpc.Channel) -> None:
        self.directory = directory
        self._controller = csi_pb2_grpc.ControllerStub(channel)
        self._node = csi_pb2_grpc.NodeStub(channel)

    def image(self, volume: Volume, pool: Path | None = None) -> Path:
        return (pool or self.directory / "pool") / "volumes" / volume.id / "image.raw"

    def record(self, volume: Volume) -> dict[str, Any]:
        return json.loads((self.directory / f"state/registry/volumes/{volume.id}.json").read_text())

    def staging(self, volume: Volume) -> Path:
        return self.directory / "staging" / volume.name

    def create(self, name: str, size_mib: int, source: Volume | None = None, **parameters: str) -> Volume:
        request = csi_pb2.CreateVolumeRequest(
            name=name,
            capacity_range=csi_pb2.CapacityRange(required_bytes=size_mib * MIB),
            volume_capabilities=[block()],
            parameters=parameters,
        )
        if source is not None:
            request.volume_content_source.volume.volume_id = source.id
        answer = self._controller.CreateVolume(request, timeout=CALL_TIMEOUT_S)
        return Volume(answer.volume.volume_id, name)

    def delete(self, volume: Volume) -> None:
        request = csi_pb2.DeleteVolumeRequest(volume_id=volume.id)
        self._controller.DeleteVolume(request, timeout=CALL_TIMEOUT_S)

    def give(self, volume: Volume, node_id: str, capability: csi_pb2.VolumeCapability) -> dict[str, str]:
        """ControllerPublishVolume; returns the publish_context."""
        request = csi_pb2.ControllerPublishVolumeRequest(
            volume_id=volume.id, node_id=node_id, volume_capability=capability
        )
        answer = self._controller.ControllerPublishVolume(request, timeout=CALL_TIMEOUT_S)
        return dict(answer.publish_context)

    def take(self, volume: Volume, node_id: str) -> None:
        """ControllerUnpublishVolume."""
        request = csi_pb2.ControllerUnpublishVolumeRequest(volume_id=volume.id, node_id=node_id)
        self._controller.ControllerUnpublishVolume(request, timeout=CALL_TIMEOUT_S)

    def stage(
        self,
        volume: Volume,
        capability: csi_pb2.VolumeCapability,
        *,
        told: Mapping[str, str] | None = None,
        attributes: Mapping[str, str] | None = None,
    ) -> Path:
        """NodeStageVolume; `told` is a publish_context, `attributes` a volume_context."""
        request = csi_pb2.NodeStageVolumeRequest(
            volume_id=volume.id,
            staging_target_path=str(self.staging(volume)),
            volume_capability=capability,
            publish_context=told,
            volume_context=attributes,
        )
        self._node.NodeStageVolume(request, timeout=CALL_TIMEOUT_S)
        return self.staging(volume)

    def unstage(self, volume: Volume) -> None:
        request = csi_pb2.NodeUnstageVolumeRequest(
            volume_id=volume.id, staging_target_path=str(self.staging(volume))
        )
        self._node.NodeUnstageVolume(request, timeout=CALL_TIMEOUT_S)

    def publish(
        self, volume: Volume, name: str, capability: csi_pb2.VolumeCapability, *, readonly: bool = False
    ) -> Path:
        target = self.directory / "pods" / name
        request = csi_pb2.NodePublishVolumeRequest(
            volume_id=volume.id,
            staging_target_path=str(self.staging(volume)),
            target_path=str(target),
            volume_capability=capability,
            readonly=readonly,
        )
        self._node.NodePublishVolume(request, timeout=CALL_TIMEOUT_S)
        return target

    def unpublish(self, volume: Volume, name: str) -> None:
        request = csi_pb2.NodeUnpublishVolumeRequest(
            volume_id=volume.id, target_path=str(self.directory / "pods" / name)
        )
        self._node.NodeUnpublishVolume(request, timeout=CALL_TIMEOUT_S)

    def expand(self, volume: Volume, path: Path, size_mib: int) -> int:
        """As kubelet and sidecar do: the controller first, then the node; return the node's answer."""
        wanted = csi_pb2.CapacityRange(required_bytes=size_mib * MIB)
        grown = csi_pb2.ControllerExpandVolumeRequest(volume_id=volume.id, capacity_range=wanted)
        assert self._controller.ControllerExpandVolume(grown, timeout=CALL_TIMEOUT_S).node_expansion_required
        return self.expand_on_node(volume, path, size_mib)

    def expand_on_node(self, volume: Volume, path: Path, size_mib: int) -> int:
        """Return the node's answer."""
        wanted = csi_pb2.CapacityRange(required_bytes=size_mib * MIB)
        request = csi_pb2.NodeExpandVolumeRequest(
            volume_id=volume.id, volume_path=str(path), capacity_range=wanted
        )
        return self._node.NodeExpandVolume(request, timeout=CALL_TIMEOUT_S).capacity_bytes

    def stats(self, volume: Volume, path: Path) -> csi_pb2.NodeGetVolumeStatsResponse:
        request = csi_pb2.NodeGetVolumeStatsRequest(volume_id=volume.id, volume_path=str(path))
        return self._node.NodeGetVolumeStats(request, timeout=CALL_TIMEOUT_S)

    def health(self, volume: Volume) -> list[str]:
        """Return the reasons for which a volume is not healthy."""
        request = csi_pb2.NodeGetVolumeHealthRequest(volume_id=volume.id)
        answer = self._node.NodeGetVolumeHealth(request, timeout=CALL_TIMEOUT_S)
        return [entry.reason for entry in answer.volume_health.health_statuses]

    def leftovers(self) -> list[str]:
        """Return what a volume in use leaves on the node: devices, workers' directories, mounts."""
        mounts = Path("/proc/self/mounts").read_text().splitlines()
        return sorted(
            [str(path) for path in Path("/dev/vduse").iterdir() if path.name != "control"]
            + [str(path) for path in (self.directory / "run/volumes").glob("*")]
            + [line for line in mounts if str(self.directory) in line]
        )


@contextlib.contextmanager
def driver_in(directory: Path, *pools: Path) -> Iterator[Driver]:
    """Run a driver with everything below `directory`; nothing may be left of its volumes at the end."""
    with standalone(directory, *pools) as endpoint, grpc.insecure_channel(f"unix:{endpoint}") as channel:
        (directory / "staging").mkdir()
        driver = Driver(directory, channel)
        yield driver
        assert driver.leftovers() == []


@pytest.fixture(scope="session")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Driver]:
    """One driver for all tests that import this: its start takes most of a minute in an emulated machine.

    A test gives back all volumes that it made.
    """
    with driver_in(tmp_path_factory.mktemp("driver")) as running:
        yield running


@contextlib.contextmanager
def refused(code: grpc.StatusCode, says: str) -> Iterator[None]:
    """Expect a call to end with a status whose text contains `says`."""
    with pytest.raises(grpc.RpcError) as caught:
        yield
    assert caught.value.code() is code, caught.value.details()
    assert says in caught.value.details()
