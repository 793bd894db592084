"""What one wants to see when something failed: everything that the cluster says of itself, in one folder.

The logs of the control plane and of the nodes are in the cluster's log folder from the start; this adds what only the
API and the nodes know. What is kept true: collecting never fails, and never waits long for something that is broken.
"""

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from lab.cluster.layout import Layout
from lab.cluster.node import NodeMachine
from lab.errors import LabError
from lab.host import run, say

_ASK_S = 60.0
_KINDS = (
    "nodes,csinodes,csidrivers,storageclasses,persistentvolumes,volumeattachments",
    "pods,persistentvolumeclaims,deployments,daemonsets,csistoragecapacities",
    "volumesnapshots,volumesnapshotcontents,vdusevolumes,vdusesnapshots,vdusenodes",
)


def collect(layout: Layout) -> Path:
    """Collect into the cluster's log folder, and return it."""
    layout.logs.mkdir(parents=True, exist_ok=True)
    _ask_api(layout, "events.txt", "get events -A --sort-by=.lastTimestamp")
    for kinds in _KINDS:
        for kind in kinds.split(","):
            _ask_api(layout, f"{kind}.yaml", f"get {kind} -A -o yaml")
            _ask_api(layout, f"{kind}.txt", f"describe {kind} -A")
    for node in layout.nodes:
        _collect_node(layout, node.name, NodeMachine(layout, node))
    say(f"cluster: logs and state are in {layout.logs}")
    return layout.logs


def _collect_node(layout: Layout, name: str, machine: NodeMachine) -> None:
    questions = {
        "dmesg": "dmesg",
        "mounts": "findmnt --list",
        "vdpa": "ls -lR /sys/bus/vdpa/devices /dev/vduse",
        "containers": "ctr --address /run/containerd/containerd.sock --namespace k8s.io containers list",
    }
    for what, question in questions.items():
        with _kept_errors(layout.logs / f"{name}-{what}.txt") as file:
            done = machine.run("sh", "-c", f"timeout 30 {question} 2>&1", check=False)
            file.write_text(done.stdout)
    target = layout.logs / f"{name}-pods"
    shutil.rmtree(target, ignore_errors=True)
    with contextlib.suppress(LabError):
        machine.run("cp", "-rL", "/var/log/pods", str(target), check=False)


def _ask_api(layout: Layout, file_name: str, question: str) -> None:
    with _kept_errors(layout.logs / file_name) as file:
        file.write_text(run([str(layout.kubectl), *question.split()], timeout_s=_ASK_S))


@contextlib.contextmanager
def _kept_errors(file: Path) -> Iterator[Path]:
    try:
        yield file
    except LabError as error:
        file.write_text(f"{error}\n")
