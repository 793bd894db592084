"""Runs csi-sanity, the conformance suite of CSI, against a socket and reads its report.

The program is built by tools/build_csi_sanity.sh at a pinned version. A suite that tests nothing must not
pass, so the report tells what ran.
"""

from __future__ import annotations

import subprocess
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / ".cache/bin/csi-sanity"
MIB = 1 << 20
_LEAST_PASSED = 70

# Why csi-sanity may skip a spec, in its own words: features of CSI that this driver does not advertise.
_NOT_ADVERTISED = frozenset(
    {
        "ControllerGetVolumeHealth not supported",
        "ControllerListVolumeHealth not supported",
        "GroupControllerService not supported",
        "SNAPSHOT_ACCESSIBILITY_CONSTRAINTS not supported",
        # The limit that NodeGetInfo tells is kept by the scheduler and by the node's agent.
        "testnodevolumeattachlimit not enabled",
    }
)

# The same where volumes are not published.
_NOT_PUBLISHED = frozenset(
    {
        "Controller Publish, UnpublishVolume not supported",
        "ControllerPublishVolume not supported",
        "ControllerUnpublishVolume not supported",
    }
)


@dataclass(frozen=True)
class Report:
    """What csi-sanity found: names of specs by outcome, and its output.

    Specs that csi-sanity itself has put aside ("pending") are in none of these.
    """

    passed: tuple[str, ...]
    failed: tuple[str, ...]
    skipped: tuple[tuple[str, str], ...]
    output: str

    def require_success(self, *, publishes: bool = False) -> None:
        """Raise AssertionError with the suite's output unless all that we advertise was tested and passed.

        publishes: the driver advertises ControllerPublishVolume.
        """
        assert not self.failed, self.output[-20000:]
        allowed = _NOT_ADVERTISED if publishes else _NOT_ADVERTISED | _NOT_PUBLISHED
        unexpected = [one for one in self.skipped if one[1] not in allowed]
        assert not unexpected, unexpected
        assert len(self.passed) >= _LEAST_PASSED, self.passed


def build() -> Path:
    """Return the program, building it if it is not there; where it is there already no Go is needed."""
    if not PROGRAM.exists():
        subprocess.run([str(ROOT / "tools/build_csi_sanity.sh")], check=True, timeout=600)
    return PROGRAM


def command(endpoint: Path, directory: Path, access_type: str) -> list[str]:
    """Return how to run it.

    Args:
        endpoint: the CSI socket.
        directory: for mounts and the report; exists.
        access_type: "mount" or "block".
    """
    mutable = directory / "mutable.yaml"
    mutable.write_text('maxIops: "100000"\n')
    return [
        str(PROGRAM),
        f"--csi.endpoint=unix://{endpoint}",
        f"--csi.mountdir={directory}/mount",
        f"--csi.stagingdir={directory}/staging",
        f"--csi.testvolumeaccesstype={access_type}",
        f"--csi.testvolumesize={32 * MIB}",
        f"--csi.testvolumeexpandsize={64 * MIB}",
        f"--csi.testvolumemutableparameters={mutable}",
        f"--ginkgo.junit-report={directory}/report.xml",
        "--ginkgo.no-color",
        "--ginkgo.seed=1",
    ]


def read_report(directory: Path, output: str) -> Report:
    """Read the report that `command` left; a run that left none has failed."""
    passed, failed, skipped = [], [], []
    path = directory / "report.xml"
    if not path.exists():
        return Report((), ("csi-sanity left no report",), (), output)
    for case in ET.parse(path).iter("testcase"):
        name, status = case.get("name", ""), case.get("status", "")
        reason = case.find("skipped")
        if not name.startswith("[It]") or status == "pending":
            continue
        if status == "passed":
            passed.append(name)
        elif status == "skipped" and reason is not None:
            message = reason.get("message", "").removeprefix("skipped - ")
            skipped.append((name, message))
        else:
            failed.append(name)
    return Report(tuple(passed), tuple(failed), tuple(skipped), output)
