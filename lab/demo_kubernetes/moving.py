"""A volume of a storage server goes from node to node with its pod, also when the first node is cut off or lost."""

import json
import time

from lab.cluster import storage
from lab.cluster.control_plane import ControlPlane
from lab.cluster.node import NodeMachine
from lab.demo_kubernetes import helm
from lab.demo_kubernetes.kubectl import WAIT_S
from lab.demo_kubernetes.life import Shown, same
from lab.paths import CHECKOUT

_VALUES = CHECKOUT / "lab" / "demo_kubernetes" / "values-remote.yaml"
_OUT_OF_SERVICE = "node.kubernetes.io/out-of-service"
_WATCH_S = 10
# Run in the pod: writes for as long as it can, in the background.
_WRITE_ON = "(while :; do echo line >>/data/lines; sync; done) >/dev/null 2>&1 &"
# Run in the agent's container of a node: asks for an export as a worker does.
_KNOCK = """
import sys
from pathlib import Path
from csi_vduse.dataplane.backend_spec import NbdBackend, NbdTls
from csi_vduse.dataplane.nbd_config import probe
from csi_vduse.errors import VduseError
try:
    print(probe(NbdBackend(sys.argv[1], NbdTls(Path(sys.argv[2]))), timeout_s=30).size_bytes, "bytes")
except VduseError as error:
    print("refused:", error.message)
"""


def serve(shown: Shown) -> None:
    """A storage server, and a release of the driver that knows it."""
    story = shown.story
    story.step("Start a storage server, and tell the driver of it")
    storage.lay(shown.cluster.layout)
    plane = ControlPlane(shown.cluster.layout)
    if not plane.find("storage-server"):
        plane.start("storage-server")
    for secret, folder in (("storage-controller", storage.CONTROLLER), ("storage-node", storage.NODE)):
        files = f"--from-file={shown.cluster.layout.folder / folder}"
        made = shown.driver("create", "secret", "generic", secret, files, "--dry-run=client", "-o", "yaml")
        shown.driver.apply_text(made)
    story.asked(f"helm upgrade {helm.RELEASE} ... --values {_VALUES.name}")
    helm.release(shown.cluster, values=(helm.VALUES, _VALUES))
    story.seen(shown.kubectl("get", "storageclass"))


def write(shown: Shown) -> None:
    """A pod on the first node writes."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Write 16 MiB in a pod on the first node")
    story.asked("kubectl apply -f remote.yaml")
    kubectl.apply("remote.yaml")
    pod, node = _pod(shown)
    shown.checksums["writer"] = kubectl.sh(
        pod, "dd if=/dev/urandom of=/data/file bs=1M count=16 2>/dev/null; sync; sha256sum </data/file"
    )
    story.check(node == "node-1", f"the pod runs on {node}")
    story.seen(kubectl("get", "vdusevolumes", "-o", "wide"))


def move(shown: Shown) -> None:
    """The first node is not to be used: the pod goes to the second."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Drain the pod to the second node, and back")
    for away, target in (("node-1", "node-2"), ("node-2", "node-1")):
        kubectl("cordon", away)
        kubectl("delete", "pod", "--selector=app=mover", "--wait=true")
        _moved(shown, target)
        kubectl("uncordon", away)


def cut_off(shown: Shown) -> None:
    """The first node runs on and reaches the storage server, but the control plane does not reach it."""
    story, kubectl = shown.story, shown.kubectl
    story.step("The first node is cut off from the control plane, and its pod writes on")
    pod, _ = _pod(shown)
    kubectl.sh(pod, _WRITE_ON)
    first = _machine(shown, 1)
    first.cut_off()
    _out_of_service(shown)
    second = _moved(shown, "node-2")
    lines = _lines(shown, second)
    ended, waiting = _writes(first)
    time.sleep(_WATCH_S)
    story.check(first.run("pgrep", "-f", "/data/lines").stdout != "", "the old pod's writer lives on node-1")
    story.check(_writes(first) == (ended, waiting) and waiting > 0, f"its {waiting} writes wait, none ends")
    story.check(
        lines == _lines(shown, second) != "0", f"the new pod has {lines} lines of it, and no more come"
    )

    story.step("The first node is restarted, and the pod comes back")
    first.power_on(first.power_off())
    _in_service(shown)
    kubectl("delete", "pod", "--selector=app=mover", "--wait=true")
    pod = _moved(shown, "node-1")
    story.check(kubectl.sh(pod, "wc -l </data/lines") == lines, f"it has the {lines} lines")


def lose(shown: Shown) -> None:
    """The first node loses its power."""
    story, kubectl = shown.story, shown.kubectl
    story.step("The first node loses its power")
    (attached,) = kubectl.objects("volumeattachments")
    told = attached["status"]["attachmentMetadata"]
    first = _machine(shown, 1)
    off = first.power_off()
    _out_of_service(shown)
    pod = _moved(shown, "node-2")
    kubectl.sh(pod, "echo second >/data/second; sync")

    story.step("The first node comes back")
    first.power_on(off)
    _in_service(shown)
    agent = next(
        found["metadata"]["name"]
        for found in shown.driver.objects("pods", "--selector=app.kubernetes.io/component=agent")
        if found["spec"]["nodeName"] == "node-1"
    )
    python = "/opt/csi-vduse/bin/python"
    said = shown.driver("exec", agent, "--", python, "-c", _KNOCK, told["uri"], told["tlsDirectory"])
    story.seen(said)
    story.check(said.startswith("refused"), "the export that it had does not exist: it cannot write")
    pod, node = _pod(shown)
    same(shown, pod, "it has the data")
    story.check(kubectl.sh(pod, "cat /data/second") == "second", f"the pod on {node} has what it wrote")


def clean_up(shown: Shown) -> None:
    """Delete everything, and look for what is left on the storage server."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Delete everything")
    kubectl.delete("remote.yaml")
    kubectl.wait_until(lambda: not kubectl.objects("vdusevolumes"), "there are no vdusevolumes")
    images = shown.cluster.layout.folder / storage.IMAGES
    left = [str(path) for path in images.rglob("*.raw")]
    story.check(not left, "the storage server has no image" + (f": {json.dumps(left)}" if left else ""))


STEPS = (serve, write, move, cut_off, lose, clean_up)


def _pod(shown: Shown) -> tuple[str, str]:
    """The pod that runs now, and its node; waits until there is one."""
    kubectl = shown.kubectl
    kubectl("rollout", "status", "deployment/mover", f"--timeout={WAIT_S}s")
    (pod,) = (
        found
        for found in kubectl.objects("pods", "--selector=app=mover")
        if "deletionTimestamp" not in found["metadata"]
    )
    return pod["metadata"]["name"], pod["spec"]["nodeName"]


def _moved(shown: Shown, target: str) -> str:
    """The pod, which has to run on `target` and to have its data."""
    pod, node = _pod(shown)
    shown.story.check(node == target, f"the pod runs on {node}")
    same(shown, pod, "it has the data")
    return pod


def _out_of_service(shown: Shown) -> None:
    """Do what an administrator does about a node that does not answer."""
    story, kubectl = shown.story, shown.kubectl
    kubectl("wait", "--for=condition=Ready=Unknown", "node/node-1", f"--timeout={WAIT_S}s")
    story.seen(kubectl("get", "nodes"))
    story.asked(f"kubectl taint node node-1 {_OUT_OF_SERVICE}=nodeshutdown:NoExecute")
    kubectl("taint", "node", "node-1", f"{_OUT_OF_SERVICE}=nodeshutdown:NoExecute")


def _in_service(shown: Shown) -> None:
    """Wait for the node that was restarted, and for the driver on it."""
    shown.kubectl("wait", "--for=condition=Ready", "node/node-1", f"--timeout={WAIT_S}s")
    shown.kubectl("taint", "node", "node-1", f"{_OUT_OF_SERVICE}-")
    helm.wait(shown.cluster)


def _machine(shown: Shown, number: int) -> NodeMachine:
    return shown.machines[number - 1]


def _lines(shown: Shown, pod: str) -> str:
    """How many lines the first pod has written, read from the disk and not from the second node's memory."""
    _machine(shown, 2).run("sysctl", "-q", "vm.drop_caches=3")
    return shown.kubectl.sh(pod, "wc -l </data/lines")


def _writes(node: NodeMachine) -> tuple[int, int]:
    """Requests that the node's one virtio disk has ended as writes, and those that wait.

    Source: Linux, Documentation/block/stat.rst.
    """
    fields = node.run("sh", "-c", "cat /sys/block/vd*/stat").stdout.split()
    return int(fields[4]), int(fields[8])
