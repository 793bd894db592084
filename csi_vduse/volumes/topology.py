"""From where a volume can be used: pure decisions about CSI topology.

A file pool is a directory of one node, so its volumes have exactly one segment: that node. Volumes of a pool that
is on no node have no segments, and can be used everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

TOPOLOGY_KEY = "topology.csi.vduse.dev/node"

Segments = Mapping[str, str]


@dataclass(frozen=True)
class TopologyRequirement:
    """Where the caller wants a new volume to be usable: one of `requisite`; `preferred` are wishes."""

    requisite: tuple[Segments, ...] = ()
    preferred: tuple[Segments, ...] = ()


def node_segments(node_id: str) -> dict[str, str]:
    """Return the topology of a node, as NodeGetInfo answers it; of no node: everywhere."""
    return {TOPOLOGY_KEY: node_id} if node_id else {}


def includes(term: Segments, segments: Segments) -> bool:
    """Tell whether `segments`, a place or everywhere, can be used within `term`.

    Keys compare without case (CSI, Topology).
    """
    own = {key.lower(): value for key, value in segments.items()}
    return not segments or all(own.get(key.lower()) == value for key, value in term.items())


def satisfies(requirement: TopologyRequirement | None, segments: Segments) -> bool:
    """Tell whether a volume that is usable at `segments` only meets the requirement.

    With `requisite` terms one of them must hold; without, the `preferred` ones are all that was said and one
    of them must hold (CSI, TopologyRequirement); no terms at all allow any place.
    """
    if requirement is None:
        return True
    terms: Sequence[Segments] = requirement.requisite or requirement.preferred
    return not terms or any(includes(term, segments) for term in terms)
