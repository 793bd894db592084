"""What a worker says of itself, so that an agent of another release knows how to treat it.

Two numbers decide. PROTOCOL is of the control channel: it grows when an agent has to know whether a worker
understands something; a worker of a later release still understands OLDEST_PROTOCOL and what came after it. The
other is that of the in-flight log (inflight.py): a worker serves a device only if it reads the log's version.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any, Final

from csi_vduse import __version__

# 1: ping tells versions; prepare and release (handover).
PROTOCOL: Final = 1
OLDEST_PROTOCOL: Final = 1

# Processes forked from one another run the same program: they share what was made when it was imported.
IMAGE: Final = os.urandom(8).hex()


@dataclass(frozen=True)
class Hello:
    """Who answers a ping.

    Args:
        pid: the process, as it sees itself.
        started: whether it serves a device.
        version: its release.
        protocol: newest protocol it speaks; 0 if it is from before there were numbers.
        oldest_protocol: oldest one that it speaks.
        image: equal in processes that run the same program from the same start; empty if unknown.
    """

    pid: int
    started: bool
    version: str = ""
    protocol: int = 0
    oldest_protocol: int = 0
    image: str = ""

    @property
    def can_hand_over(self) -> bool:
        """Whether it speaks the protocol in which we ask for a handover."""
        return self.oldest_protocol <= PROTOCOL and self.protocol >= OLDEST_PROTOCOL


def hello(*, started: bool) -> dict[str, Any]:
    """Return the answer to a ping."""
    return asdict(Hello(os.getpid(), started, __version__, PROTOCOL, OLDEST_PROTOCOL, IMAGE))


def hello_from_json(answer: dict[str, Any]) -> Hello:
    """Decode the answer to a ping; what it does not say is as an old worker has it."""
    return Hello(
        pid=int(answer.get("pid", 0)),
        started=bool(answer.get("started", True)),
        version=str(answer.get("version", "")),
        protocol=int(answer.get("protocol", 0)),
        oldest_protocol=int(answer.get("oldest_protocol", 0)),
        image=str(answer.get("image", "")),
    )
