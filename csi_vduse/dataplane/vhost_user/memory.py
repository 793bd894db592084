"""The front-end's memory: which ranges of guest addresses are where in which file.

Two kinds of addresses name the same bytes: descriptors in a ring hold *guest* addresses, messages about rings hold
*user* addresses (of the front-end's own mapping). A table is a value: a change makes a new one, so that it can be
tried on the engine before the old one is given up.
Kept true: no two regions of a table overlap in either kind of address.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass

from csi_vduse.dataplane.engine import Region
from csi_vduse.dataplane.vhost_user.protocol import MemoryRegion
from csi_vduse.errors import ProtocolError


@dataclass(frozen=True)
class MappedRegion:
    """A region and the descriptor of its file; the descriptor belongs to whoever has the newest table."""

    region: MemoryRegion
    fd: int


@dataclass(frozen=True)
class MemoryTable:
    """The regions of one moment."""

    regions: tuple[MappedRegion, ...] = ()

    def replaced(self, regions: Iterable[MappedRegion]) -> MemoryTable:
        """Return a table of these regions only.

        Raises:
            ProtocolError: two of them overlap.
        """
        table = MemoryTable()
        for region in regions:
            table = table.added(region)
        return table

    def added(self, mapped: MappedRegion) -> MemoryTable:
        """Return this table with one region more.

        Raises:
            ProtocolError: it overlaps one that is there.
        """
        new = mapped.region
        for other in (m.region for m in self.regions):
            if _overlap(new.guest_address, other.guest_address, new, other) or _overlap(
                new.user_address, other.user_address, new, other
            ):
                raise ProtocolError(
                    f"memory region {_text(new)} overlaps {_text(other)}",
                )
        return MemoryTable((*self.regions, mapped))

    def find(self, region: MemoryRegion) -> MappedRegion:
        """Return the region that REM_MEM_REG means: the offset in the file does not matter.

        Raises:
            ProtocolError: there is none.
        """
        for mapped in self.regions:
            there = mapped.region
            if (there.guest_address, there.user_address, there.size_bytes) == (
                region.guest_address,
                region.user_address,
                region.size_bytes,
            ):
                return mapped
        raise ProtocolError(f"there is no memory region {_text(region)}")

    def without(self, mapped: MappedRegion) -> MemoryTable:
        """Return this table without one of its regions."""
        return MemoryTable(tuple(m for m in self.regions if m is not mapped))

    def guest_address(self, user_address: int) -> int:
        """Translate an address of the front-end's own into one of the guest.

        Raises:
            ProtocolError: it is in no region.
        """
        for region in (m.region for m in self.regions):
            if 0 <= user_address - region.user_address < region.size_bytes:
                return region.guest_address + (user_address - region.user_address)
        raise ProtocolError(f"user address {user_address:#x} is in no memory region")

    def engine_regions(self) -> list[Region]:
        """Return the address map as the engine takes it."""
        return [
            Region(m.region.guest_address, m.region.size_bytes, m.region.mmap_offset, m.fd, writable=True)
            for m in self.regions
        ]

    def close(self, keep: MemoryTable | None = None) -> None:
        """Close the descriptors of the regions, but for those that another table has too."""
        kept = {id(m) for m in keep.regions} if keep else set()
        for mapped in self.regions:
            if id(mapped) not in kept:
                os.close(mapped.fd)


def _overlap(a: int, b: int, region_a: MemoryRegion, region_b: MemoryRegion) -> bool:
    return a < b + region_b.size_bytes and b < a + region_a.size_bytes


def _text(region: MemoryRegion) -> str:
    return f"{region.guest_address:#x}+{region.size_bytes:#x} (user {region.user_address:#x})"
