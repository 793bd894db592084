"""What is called wrong with a volume, from the agent's word alone."""

from __future__ import annotations

from pathlib import Path

from csi_vduse.agent.model import Attachment, AttachSpec, State
from csi_vduse.dataplane.backend_spec import FileBackend
from csi_vduse.node.context import Observed
from csi_vduse.node.health import Severity, findings

SPEC = AttachSpec("vol-1", FileBackend(Path("/image")), 1 << 20)


def test_requests_that_wait_make_a_volume_degraded_and_the_reason_is_told() -> None:
    waiting = Attachment(
        SPEC, State.ATTACHED, state_reason="3 requests wait: the last write failed with ENOSPC"
    )
    (finding,) = findings(Observed(waiting, (waiting,), ()))
    assert (finding.severity, finding.reason) == (Severity.DEGRADED, "RequestsWait")
    assert "ENOSPC; they go on by themselves" in finding.message


def test_a_volume_that_is_served_is_healthy() -> None:
    served = Attachment(SPEC, State.ATTACHED)
    assert findings(Observed(served, (served,), ())) == ()
