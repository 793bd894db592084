"""What the node itself does with a volume is not slowed down by the volume's limits; what its users do is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from csi_vduse.dataplane.throttle import UNLIMITED, Throttle
from csi_vduse.errors import CommandFailed, DeadlineExceeded, FailedPrecondition, Unavailable, VduseError
from csi_vduse.node import mounts
from csi_vduse.node.expand import expand
from csi_vduse.volumes.model import Volume
from csi_vduse.volumes.sizes import CapacityRange
from tests.unit.node.conftest import MIB, LoopNode, use

SLOW = Throttle(1, 64 << 10)


async def slow_volume(lab: LoopNode, size_mib: int = 320) -> Volume:
    volume = await lab.create(size_mib=size_mib)
    return await lab.node.registry.update_volume(volume.id, lambda old: replace(old, throttle=SLOW))


def in_force(lab: LoopNode, volume: Volume) -> Throttle:
    return lab.agent.attachments[volume.id].spec.throttle


@pytest.fixture
def seen(loop_node: LoopNode, monkeypatch: pytest.MonkeyPatch) -> list[Throttle]:
    """The limits that were in force whenever a command touched a disk."""
    found: list[Throttle] = []
    real: Callable[..., Any] = mounts.run

    async def watched(argv: list[str], **options: Any) -> Any:
        if argv[0] in {"umount", "xfs_growfs"} or "/dev/loop" in " ".join(argv):
            found.extend(attachment.spec.throttle for attachment in loop_node.agent.attachments.values())
        return await real(argv, **options)

    for module in ("mounts", "probe", "formatting", "filesystems.xfs", "filesystems.ext4"):
        monkeypatch.setattr(f"csi_vduse.node.{module}.run", watched)
    return found


async def test_staging_is_not_throttled_and_its_end_is_the_beginning_of_the_limits(
    loop_node: LoopNode, seen: list[Throttle]
) -> None:
    volume = await slow_volume(loop_node)
    for _ in range(2):
        await loop_node.stage(volume, use("xfs"))
        assert in_force(loop_node, volume) == SLOW
    assert len(seen) > 3
    assert set(seen) == {UNLIMITED}


async def test_a_raw_volume_has_its_limits_when_it_is_staged(loop_node: LoopNode) -> None:
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use(None))
    assert in_force(loop_node, volume) == SLOW


async def test_a_stage_that_goes_on_after_another_is_not_throttled_either(
    loop_node: LoopNode, seen: list[Throttle]
) -> None:
    """The attachment is there, with its limits in force, and the file system is not mounted."""
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use(None))
    await loop_node.stage(volume, use("xfs"))
    assert set(seen) == {UNLIMITED}
    assert in_force(loop_node, volume) == SLOW


async def test_a_stage_that_fails_leaves_an_attachment_with_the_limits_that_it_had(
    loop_node: LoopNode,
) -> None:
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use(None))
    with pytest.raises(FailedPrecondition):
        await loop_node.stage(volume, use("xfs", use().mode, "nosuchoption"))
    assert in_force(loop_node, volume) == SLOW


async def test_unmounting_is_not_throttled(loop_node: LoopNode, seen: list[Throttle]) -> None:
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use("xfs"))
    seen.clear()
    await loop_node.unstage(volume)
    assert set(seen) == {UNLIMITED}


async def test_limits_stay_while_a_volume_is_in_use(loop_node: LoopNode, seen: list[Throttle]) -> None:
    volume = await slow_volume(loop_node)
    path = await loop_node.stage(volume, use("xfs"))
    await loop_node.publish(volume, "pod", use("xfs"))
    seen.clear()
    with pytest.raises(FailedPrecondition, match="in use"):
        await loop_node.unstage(volume)
    await loop_node.unpublish(volume, "pod")
    with Path(path, "f").open("w"), pytest.raises(FailedPrecondition, match="cannot unmount"):
        await loop_node.unstage(volume)
    assert in_force(loop_node, volume) == SLOW


async def test_what_does_not_end_in_time_goes_on_without_limits(
    loop_node: LoopNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody uses the volume any more but the kernel, which is writing the last data back."""
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use("xfs"))

    async def hangs(path: str) -> None:
        raise DeadlineExceeded(f"umount {path}")

    with monkeypatch.context() as patch:
        patch.setattr("csi_vduse.node.unstage.unmount", hangs)
        with pytest.raises(DeadlineExceeded):
            await loop_node.unstage(volume)
    assert in_force(loop_node, volume) == UNLIMITED
    await loop_node.unstage(volume)


async def test_limits_that_cannot_be_lifted_keep_no_volume(loop_node: LoopNode) -> None:
    volume = await slow_volume(loop_node)
    await loop_node.stage(volume, use("xfs"))
    loop_node.agent.fail["throttle"] = Unavailable("the worker is dead")
    await loop_node.unstage(volume)


async def test_growing_is_not_throttled(loop_node: LoopNode, seen: list[Throttle]) -> None:
    volume = await slow_volume(loop_node)
    path = await loop_node.stage(volume, use("xfs"))
    await loop_node.agent.throttle(volume.id, Throttle(7))  # by hand, on the node
    await loop_node.grow(volume, 400)
    seen.clear()
    assert await expand(loop_node.node, volume.id, path, CapacityRange()) == 400 * MIB
    assert len(seen) >= 2
    assert set(seen) == {UNLIMITED}
    assert in_force(loop_node, volume) == Throttle(7)


@pytest.mark.parametrize("interrupted", [False, True])
async def test_limits_are_back_after_a_growth_that_failed(
    loop_node: LoopNode, monkeypatch: pytest.MonkeyPatch, *, interrupted: bool
) -> None:
    volume = await slow_volume(loop_node)
    path = await loop_node.stage(volume, use("xfs"))
    if interrupted:  # by the end of this process, after it had lifted them
        await loop_node.agent.throttle(volume.id, UNLIMITED)

    async def fails(*_: object) -> None:
        raise CommandFailed(["xfs_growfs"], 1, "no luck")

    monkeypatch.setattr("csi_vduse.node.filesystems.xfs.Xfs.grow", fails)
    await loop_node.grow(volume, 400)
    with pytest.raises(VduseError, match="no luck"):
        await expand(loop_node.node, volume.id, path, CapacityRange())
    assert in_force(loop_node, volume) == SLOW
