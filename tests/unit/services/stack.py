"""A controller on real directories with a fake agent: what the tests of the services call.

`Mortal` objects stand before the registry and the pool and die at a chosen step: from then on every call
fails, as for a process that was killed. What is on disk stays, and a new Stack on the same directory goes on.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from csi_vduse.backends.base import Backend
from csi_vduse.backends.file import FilePool
from csi_vduse.backends.pools import Pools
from csi_vduse.proto import csi_pb2
from csi_vduse.services.controller import Controller
from csi_vduse.services.copies import Copies
from csi_vduse.services.locks import LockTable
from csi_vduse.services.places import LocalPlaces
from csi_vduse.services.provisioning import Provisioner
from csi_vduse.services.publishing import KnownNodes, Publisher
from csi_vduse.services.reconcile import reconcile
from csi_vduse.services.reserving import Reservations
from csi_vduse.services.snapshotting import Snapshotter
from csi_vduse.volumes.registry_directory import DirectoryRegistry
from csi_vduse.volumes.topology import node_segments
from tests.unit.fakes.agent import FakeAgent

MIB = 1 << 20
GIB = 1 << 30
NODE = "n1"
OTHER_NODE = "n2"
Mode = csi_pb2.VolumeCapability.AccessMode


class Killed(BaseException):
    """The process is dead. Not an Exception: nothing catches it."""


class Life:
    """Ends after `steps` calls: the next dies before it acts, or after it acted but before it returned."""

    def __init__(self, steps: int | None = None, *, after_the_act: bool = False) -> None:
        self.steps = steps
        self.after_the_act = after_the_act
        self.log: list[str] = []

    @property
    def is_over(self) -> bool:
        return self.steps is not None and len(self.log) > self.steps

    async def live(self, name: str, call: Callable[[], Any]) -> Any:
        if self.is_over:
            raise Killed(name)
        self.log.append(name)
        if self.is_over and not self.after_the_act:
            raise Killed(name)
        result = await call()
        if self.is_over:
            raise Killed(name)
        return result


class Mortal:
    """Stands before an object whose async methods are the steps."""

    def __init__(self, inner: object, life: Life) -> None:
        self._inner = inner
        self._life = life

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        if not inspect.iscoroutinefunction(value):
            return value

        async def step(*args: Any, **kwargs: Any) -> Any:
            return await self._life.live(name, lambda: value(*args, **kwargs))

        return step


class Stack:
    """One controller process. Its pools are `directory`/NAME for each name."""

    def __init__(
        self,
        directory: Path,
        *,
        agent: FakeAgent | None = None,
        life: Life | None = None,
        pool_names: tuple[str, ...] = ("default",),
        more: tuple[Backend, ...] = (),
    ) -> None:
        self.directory = directory
        self.agent = agent or FakeAgent()
        life = life or Life()
        self._registry = DirectoryRegistry(directory / "state")
        self.registry: Any = Mortal(self._registry, life)
        self.backends: list[Backend] = list(more)
        for name in pool_names:
            (directory / name).mkdir(exist_ok=True)
            memory = directory / "state/pools" / f"{name}.json"
            self.backends.append(FilePool(name, directory / name, memory=memory))
        mortals: list[Any] = [Mortal(backend, life) for backend in self.backends]
        self.pools = Pools(mortals)
        segments = node_segments(NODE)
        self.locks = LockTable()
        self.copies = Copies(self.agent, self.locks)
        self.reservations = Reservations(self.registry)
        self.provisioner = Provisioner(
            registry=self.registry,
            pools=self.pools,
            agent=self.agent,
            copies=self.copies,
            reservations=self.reservations,
            segments=segments,
        )
        self.snapshotter = Snapshotter(
            registry=self.registry,
            pools=self.pools,
            copies=self.copies,
            reservations=self.reservations,
            segments=segments,
        )
        self.controller = Controller(
            registry=self.registry,
            provisioner=self.provisioner,
            snapshotter=self.snapshotter,
            publisher=Publisher(
                registry=self.registry,
                pools=self.pools,
                own_node=NODE,
                nodes=KnownNodes(frozenset({NODE, OTHER_NODE})),
            ),
            places=LocalPlaces(pools=self.pools, reservations=self.reservations, segments=segments),
        )

    async def start(self) -> None:
        await reconcile(
            registry=self.registry,
            pools=self.pools,
            provisioner=self.provisioner,
            snapshotter=self.snapshotter,
        )

    def close(self) -> None:
        self._registry.close()
        self.pools.close()

    async def create(self, name: str = "v", **fields: Any) -> csi_pb2.Volume:
        return (await self.controller.CreateVolume(create_request(name, **fields), None)).volume

    async def delete(self, volume_id: str) -> None:
        await self.controller.DeleteVolume(csi_pb2.DeleteVolumeRequest(volume_id=volume_id), None)

    async def expand(
        self, volume_id: str, required: int, limit: int = 0
    ) -> csi_pb2.ControllerExpandVolumeResponse:
        request = csi_pb2.ControllerExpandVolumeRequest(
            volume_id=volume_id,
            capacity_range=csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit),
        )
        return await self.controller.ControllerExpandVolume(request, None)

    async def snapshot(self, volume_id: str, name: str = "s") -> csi_pb2.Snapshot:
        request = csi_pb2.CreateSnapshotRequest(source_volume_id=volume_id, name=name)
        return (await self.controller.CreateSnapshot(request, None)).snapshot

    async def delete_snapshot(self, snapshot_id: str) -> None:
        await self.controller.DeleteSnapshot(csi_pb2.DeleteSnapshotRequest(snapshot_id=snapshot_id), None)

    def image(self, volume_id: str, pool: str = "default") -> Path:
        part = "snapshots" if volume_id.startswith("snap-") else "volumes"
        return self.directory / pool / part / volume_id / "image.raw"

    def write(self, volume_id: str, data: bytes, at: int = MIB, pool: str = "default") -> None:
        with self.image(volume_id, pool).open("r+b") as image:
            image.seek(at)
            image.write(data)

    def read(self, volume_id: str, length: int, at: int = MIB, pool: str = "default") -> bytes:
        with self.image(volume_id, pool).open("rb") as image:
            image.seek(at)
            return image.read(length)

    def leftovers(self) -> list[str]:
        """Every file of ours but the pools' marks."""
        return sorted(
            str(path.relative_to(self.directory))
            for path in self.directory.rglob("*")
            if path.is_file() and path.name != "pool.json" and path.parent.name != "pools"
        )


def block(mode: int = Mode.SINGLE_NODE_WRITER) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        block=csi_pb2.VolumeCapability.BlockVolume(),
        access_mode=Mode(mode=mode),  # type: ignore[arg-type]
    )


def mount(fs_type: str = "", mode: int = Mode.SINGLE_NODE_WRITER) -> csi_pb2.VolumeCapability:
    return csi_pb2.VolumeCapability(
        mount=csi_pb2.VolumeCapability.MountVolume(fs_type=fs_type),
        access_mode=Mode(mode=mode),  # type: ignore[arg-type]
    )


def create_request(
    name: str = "v",
    *,
    required: int = 4 * MIB,
    limit: int = 0,
    capabilities: tuple[csi_pb2.VolumeCapability, ...] = (),
    parameters: dict[str, str] | None = None,
    from_snapshot: str = "",
    from_volume: str = "",
    nodes: tuple[str, ...] = (),
) -> csi_pb2.CreateVolumeRequest:
    request = csi_pb2.CreateVolumeRequest(
        name=name,
        capacity_range=csi_pb2.CapacityRange(required_bytes=required, limit_bytes=limit),
        volume_capabilities=capabilities or (mount(),),
        parameters=parameters or {},
    )
    if from_snapshot:
        request.volume_content_source.snapshot.snapshot_id = from_snapshot
    if from_volume:
        request.volume_content_source.volume.volume_id = from_volume
    for node in nodes:
        request.accessibility_requirements.requisite.add(segments=node_segments(node))
    return request
