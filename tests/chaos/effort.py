"""How much of everything the short form (`make test`) and the long form (`make chaos`) do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Effort:
    """Numbers of events, and seconds of stalls."""

    worker_kills: int
    agent_kills: int
    handovers: int
    resets: int
    stopped_s: float
    stopped_in_control_s: float
    late_s: float
    mkfs_kills: int
    power_cuts: int
    server_kills: int
    link_cut_s: float


EFFORTS = {
    "short": Effort(
        worker_kills=12,
        agent_kills=4,
        handovers=4,
        resets=2,
        stopped_s=8,
        stopped_in_control_s=4,
        late_s=2,
        mkfs_kills=3,
        power_cuts=2,
        server_kills=3,
        link_cut_s=5,
    ),
    "long": Effort(
        worker_kills=200,
        agent_kills=50,
        handovers=50,
        resets=20,
        stopped_s=60,
        stopped_in_control_s=60,
        late_s=10,
        mkfs_kills=20,
        power_cuts=20,
        server_kills=50,
        link_cut_s=60,
    ),
}
