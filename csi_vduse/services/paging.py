"""Pages of a list that changes between the calls. Pure.

The token is the place of the last entry given, in an order that never changes (age, then id). So entries
added meanwhile come later and are seen, and the entry that a token names may have been deleted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol, TypeVar

from csi_vduse.errors import Pending

_TOKEN = re.compile(r"(\d{1,20})\.([a-z]+-[0-9a-f]{16})")


class Listed(Protocol):
    """What can be paged: volumes and snapshots."""

    @property
    def id(self) -> str:
        """Unique."""
        ...

    @property
    def created_at_ns(self) -> int:
        """Never changes once the entry is listed."""
        ...


T = TypeVar("T", bound=Listed)


def page(entries: Sequence[T], *, max_entries: int, starting_token: str) -> tuple[list[T], str]:
    """Return one page and the token of the next, empty if this is the last.

    Args:
        entries: all that there are, in any order.
        max_entries: length of a page; 0 for no limit.
        starting_token: from the page before, or empty.

    Raises:
        Pending: the token is none of ours; CSI wants ABORTED, so that the caller starts over.
    """
    ordered = sorted(entries, key=_place)
    if starting_token:
        match = _TOKEN.fullmatch(starting_token)
        if match is None:
            raise Pending(f"starting_token {starting_token[:40]!r} is not valid", hint="list from the start")
        after = (int(match[1]), match[2])
        ordered = [entry for entry in ordered if _place(entry) > after]
    if not max_entries or len(ordered) <= max_entries:
        return ordered, ""
    kept = ordered[:max_entries]
    return kept, f"{kept[-1].created_at_ns}.{kept[-1].id}"


def _place(entry: Listed) -> tuple[int, str]:
    return entry.created_at_ns, entry.id
