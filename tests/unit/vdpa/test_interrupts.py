"""Which processor the interrupts of a queue come to (csi_vduse/vdpa/interrupts.py)."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from csi_vduse.vdpa import interrupts
from csi_vduse.vdpa.sysfs import Roots, Sysfs


@pytest.fixture
def sysfs(tmp_path: Path) -> Sysfs:
    """Of a machine with four processors, the last one isolated."""
    processors = tmp_path / "devices/system/cpu"
    processors.mkdir(parents=True)
    (processors / "online").write_text("0-3\n")
    (processors / "isolated").write_text("3\n")
    (processors / "nohz_full").write_text("(null)\n")
    return Sysfs(Roots(sys=tmp_path))


def device(sysfs: Sysfs, name: str, *masks: str) -> list[Path]:
    files = [sysfs.vduse_dir(name) / f"vq{number}/irq_cb_affinity" for number in range(len(masks))]
    for file, mask in zip(files, masks, strict=True):
        file.parent.mkdir(parents=True)
        file.write_text(mask + "\n")
    return files


def settled(sysfs: Sysfs, name: str, *masks: str) -> list[set[int]]:
    files = device(sysfs, name, *masks)
    interrupts.settle(sysfs, name)
    return [interrupts.read_mask(file.read_text()) for file in files]


def test_each_queue_gets_the_processor_that_the_fewest_have(sysfs: Sysfs):
    """One after the other, of those that are for everybody."""
    device(sysfs, "others", "f")  # which nobody settled
    found = [settled(sysfs, f"v{number}", "f") for number in range(4)]
    assert found == [[{0}], [{1}], [{2}], [{0}]]


def test_a_queue_stays_on_the_processors_that_it_was_given(sysfs: Sysfs):
    """The kernel gave them by what submits to the queue; one that has a single one is left alone."""
    assert settled(sysfs, "v", "3", "c", "8") == [{0}, {2}, {3}]
    assert settled(sysfs, "isolated", "8") == [{3}]


def test_only_isolated_ones_are_better_than_none(sysfs: Sysfs, tmp_path: Path):
    (tmp_path / "devices/system/cpu/isolated").write_text("0-3\n")
    assert settled(sysfs, "v", "f") == [{0}]


def test_a_kernel_that_lets_nobody_choose(sysfs: Sysfs):
    sysfs.vduse_dir("old").mkdir(parents=True)
    interrupts.settle(sysfs, "old")
    assert interrupts.repair(sysfs, ["old", "gone"]) == []


def test_processors_that_are_all_offline_are_replaced(sysfs: Sysfs, tmp_path: Path):
    """And a mask of which one is left stays."""
    lost, kept = device(sysfs, "v", "4", "6")
    (tmp_path / "devices/system/cpu/online").write_text("0-1,3\n")
    assert interrupts.repair(sysfs, ["v"]) == ["v"]
    assert interrupts.read_mask(lost.read_text()) == {0}
    assert kept.read_text() == "6\n"
    assert interrupts.repair(sysfs, ["v"]) == []


@given(st.sets(st.integers(0, 300)))
def test_masks_are_read_as_they_are_written(processors: set[int]):
    assert interrupts.read_mask(interrupts.write_mask(processors)) == processors


@pytest.mark.parametrize(
    ("text", "processors"), [("0-3,8\n", {0, 1, 2, 3, 8}), ("\n", set()), ("(null)\n", set()), ("5", {5})]
)
def test_lists(text: str, processors: set[int]):
    assert interrupts.read_list(text) == processors
