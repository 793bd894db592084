"""Which processor the interrupts of a device's queues come to.

At each interrupt the kernel takes the next processor of the queue's mask (vduse_vq_update_effective_cpu in
drivers/vdpa/vdpa_user/vduse_dev.c), and a device with fewer queues than the machine has processors has masks of several:
one interrupt after the other wakes another idle processor. So a queue gets one of them for itself, the one that the
fewest queues have (docs/performance.md has what it brings).

Kept true: a processor of each mask is online. Where none is, the kernel looks for one without end in the thread that
interrupts, until the mask is another one: `repair` makes it that.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from csi_vduse.vdpa.sysfs import Sysfs

_WORD_BITS = 32


def settle(sysfs: Sysfs, name: str) -> None:
    """Give each queue of a device that was just bound a processor; fine if this kernel lets nobody choose."""
    with contextlib.suppress(OSError):
        masks = {file: read_mask(file.read_text()) for file in _masks(sysfs, name)}
        wide = {file: mask for file, mask in masks.items() if len(mask) > 1}
        usable, taken = _usable(sysfs), _taken(sysfs) if wide else Counter[int]()
        for file, mask in wide.items():
            _choose(file, mask & usable or mask & _online(sysfs), taken)


def repair(sysfs: Sysfs, names: Iterable[str]) -> list[str]:
    """Give queues of these devices whose processors are all offline another one; returns the devices."""
    repaired = []
    online = _online(sysfs)
    for name in names:
        for file in _masks(sysfs, name):
            with contextlib.suppress(OSError):
                if not read_mask(file.read_text()) & online:
                    _choose(file, _usable(sysfs) or online, _taken(sysfs))
                    repaired.append(name)
    return repaired


def read_mask(text: str) -> set[int]:
    """Processors of a mask as the kernel writes it (%*pb): words of 32 bits in hexadecimal, the highest first."""
    number = 0
    for word in text.strip().split(","):
        number = number << _WORD_BITS | int(word, 16)
    return {bit for bit in range(number.bit_length()) if number >> bit & 1}


def write_mask(processors: set[int]) -> str:
    """The other way round."""
    number = sum(1 << each for each in processors)
    words: list[str] = []
    while number or not words:
        words.append(f"{number & (1 << _WORD_BITS) - 1:08x}")
        number >>= _WORD_BITS
    return ",".join(reversed(words))


def read_list(text: str) -> set[int]:
    """Processors of a list such as 0-3,8 (%*pbl)."""
    found: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first.isdigit():
            found |= set(range(int(first), int(last or first) + 1))
    return found


def _choose(file: Path, processors: set[int], taken: Counter[int]) -> None:
    if processors:
        chosen = min(processors, key=lambda each: (taken[each], each))
        file.write_text(write_mask({chosen}) + "\n")
        taken[chosen] += 1


def _masks(sysfs: Sysfs, name: str) -> list[Path]:
    return sorted(sysfs.vduse_dir(name).glob("vq*/irq_cb_affinity"))


def _taken(sysfs: Sysfs) -> Counter[int]:
    """How many queues of this machine have each processor for themselves."""
    taken: Counter[int] = Counter()
    for name in sysfs.vduse_names():
        for file in _masks(sysfs, name):
            with contextlib.suppress(OSError):
                mask = read_mask(file.read_text())
                taken.update(mask if len(mask) == 1 else ())
    return taken


def _online(sysfs: Sysfs) -> set[int]:
    return _processors(sysfs, "online")


def _usable(sysfs: Sysfs) -> set[int]:
    """Those online that were not set aside for others (isolcpus=, nohz_full=)."""
    return _online(sysfs) - _processors(sysfs, "isolated") - _processors(sysfs, "nohz_full")


def _processors(sysfs: Sysfs, which: str) -> set[int]:
    try:
        return read_list((sysfs.roots.sys / "devices/system/cpu" / which).read_text())
    except OSError:
        return set()
