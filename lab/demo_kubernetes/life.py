"""The steps of the demo: a volume's life in a cluster, from helm install until nothing is left.

Each step is one function that asks, shows what is seen, and checks it; tests/e2e runs the same functions. What is kept
true: data is compared by checksum, and "nothing left" is what the nodes' kernels and disks say.
"""

from dataclasses import dataclass, field

from lab.cluster.cluster import Cluster
from lab.cluster.node import NodeMachine
from lab.demo.story import Story
from lab.demo_kubernetes import helm
from lab.demo_kubernetes.kubectl import WAIT_S, Kubectl
from lab.paths import CHECKOUT

DRIVER = "csi.vduse.dev"
NAMESPACE = "demo"
_MIB = 1 << 20
_LEFT = {
    "vDPA devices": "ls /sys/bus/vdpa/devices",
    "VDUSE devices": "ls /dev/vduse | grep -vx control",
    "mounts": f"grep {DRIVER} /proc/self/mountinfo",
    "volume images": "find /var/lib/csi-vduse/pool -type f -size +0 -name '*.img'",
}
"""What a node would still have of a volume: a command for each that prints it, and nothing when there is none."""


@dataclass
class Shown:
    """What one step leaves for the next ones."""

    story: Story
    cluster: Cluster
    checksums: dict[str, str] = field(default_factory=dict)

    @property
    def kubectl(self) -> Kubectl:
        """Kubectl in the demo's namespace."""
        return Kubectl(self.cluster, NAMESPACE)

    @property
    def machines(self) -> list[NodeMachine]:
        """The nodes."""
        return [NodeMachine(self.cluster.layout, node) for node in self.cluster.layout.nodes]

    @property
    def driver(self) -> Kubectl:
        """Kubectl in the driver's namespace."""
        return Kubectl(self.cluster, helm.NAMESPACE)


def install(shown: Shown) -> None:
    """Install the chart, and see it ready on every node."""
    story = shown.story
    story.step("Install the driver with Helm")
    namespace = ["create", "namespace"]
    for name in (helm.NAMESPACE, NAMESPACE):
        if name not in {o["metadata"]["name"] for o in shown.kubectl.objects("namespaces")}:
            shown.kubectl(*namespace, name)
    shown.driver(
        "label", "--overwrite", "namespace", helm.NAMESPACE, "pod-security.kubernetes.io/enforce=privileged"
    )
    story.asked(f"helm install csi-vduse {helm.CHART.relative_to(CHECKOUT)} --values {helm.VALUES.name}")
    helm.release(shown.cluster)
    story.seen(shown.driver("get", "pods", "-o", "wide"))
    shown.kubectl.wait_until(lambda: _registered(shown) == _nodes(shown), "every node has the driver")
    story.check(_registered(shown) == _nodes(shown), "kubelet on every node knows the driver")


def claim(shown: Shown) -> None:
    """A claim alone gets no volume: its pod decides on which node it is made."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Ask for a volume: StorageClass csi-vduse, 128 MiB")
    story.seen(kubectl("get", "storageclass", "csi-vduse"))
    story.asked("kubectl apply -f claim.yaml")
    kubectl.apply("claim.yaml")
    phase = kubectl.object("pvc", "data")["status"]["phase"]
    story.check(phase == "Pending", "it waits for its first consumer")


def write(shown: Shown) -> None:
    """A pod that uses the claim runs, and writes."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Start a pod that uses it, and write 16 MiB")
    story.asked("kubectl apply -f pod.yaml")
    kubectl.apply("pod.yaml")
    kubectl.wait_ready("writer")
    story.check(kubectl.object("pvc", "data")["status"]["phase"] == "Bound", "the claim is bound")
    shown.checksums["writer"] = kubectl.sh(
        "writer", "dd if=/dev/urandom of=/data/file bs=1M count=16 2>/dev/null; sync; sha256sum </data/file"
    )
    story.seen(kubectl.sh("writer", "df -h /data | tail -1"))
    device = kubectl.sh("writer", "grep ' /data ' /proc/mounts | cut -d' ' -f1")
    story.check(device.startswith("/dev/vd"), f"its file system is on a virtio disk, {device}")


def look(shown: Shown) -> None:
    """What kubectl shows of the driver's own view."""
    story = shown.story
    story.step("Look at it as the driver does")
    story.asked("kubectl get vdusevolumes -o wide")
    story.seen(shown.kubectl("get", "vdusevolumes", "-o", "wide"))
    (volume,) = shown.kubectl.objects("vdusevolumes")
    node = shown.kubectl.object("pod", "writer")["spec"]["nodeName"]
    story.check(node in str(volume), f"it is on the pod's node, {node}")


def expand(shown: Shown) -> None:
    """Expansion while the pod runs."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Expand it to 256 MiB under the running pod")
    before = _size_bytes(kubectl)
    patch = '{"spec":{"resources":{"requests":{"storage":"256Mi"}}}}'
    story.asked(f"kubectl patch pvc data -p '{patch}'")
    kubectl("patch", "pvc", "data", "-p", patch)
    kubectl.wait_until(
        lambda: kubectl.object("pvc", "data")["status"]["capacity"]["storage"] == "256Mi",
        "the claim is larger",
    )
    after = _size_bytes(kubectl)
    story.seen(kubectl.sh("writer", "df -h /data | tail -1"))
    story.check(before < 128 * _MIB < after, f"the pod sees {before // _MIB} MiB become {after // _MIB} MiB")
    same(shown, "writer", "the data is what was written")


def snapshot(shown: Shown) -> None:
    """A snapshot, and a volume made of it."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Snapshot it, change the original, restore the snapshot into another claim")
    story.asked("kubectl apply -f snapshot.yaml")
    kubectl.apply("snapshot.yaml")
    kubectl(
        "wait", "--for=jsonpath={.status.readyToUse}=true", "volumesnapshot/before", f"--timeout={WAIT_S}s"
    )
    story.seen(kubectl("get", "volumesnapshot", "before"))
    kubectl.sh("writer", "echo changed >/data/later; sync")
    story.asked("kubectl apply -f restored.yaml")
    kubectl.apply("restored.yaml")
    kubectl.wait_ready("reader")
    same(shown, "reader", "the restored volume has the data")
    files = kubectl.sh("reader", "ls /data")
    story.check("later" not in files, "and nothing that was written after the snapshot")


def raw_block(shown: Shown) -> None:
    """A volume without a file system."""
    story, kubectl = shown.story, shown.kubectl
    story.step("A raw block volume")
    story.asked("kubectl apply -f raw.yaml")
    kubectl.apply("raw.yaml")
    kubectl.wait_ready("raw")
    wrote = kubectl.sh(
        "raw",
        "dd if=/dev/urandom of=/tmp/bytes bs=1M count=8 2>/dev/null;"
        " dd if=/tmp/bytes of=/dev/disk bs=1M conv=fsync 2>/dev/null; sha256sum </tmp/bytes",
    )
    read = kubectl.sh("raw", "dd if=/dev/disk bs=1M count=8 2>/dev/null | sha256sum")
    story.check(wrote == read, "the pod reads from the device what it wrote to it")


def come_back(shown: Shown) -> None:
    """Pods come and go, data stays."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Delete the pod and make it again")
    story.asked("kubectl delete -f pod.yaml; kubectl apply -f pod.yaml")
    kubectl.delete("pod.yaml")
    kubectl.apply("pod.yaml")
    kubectl.wait_ready("writer")
    same(shown, "writer", "the data is intact")


def clean_up(shown: Shown) -> None:
    """Delete everything, and look for what is left."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Delete everything")
    for manifest in ("pod.yaml", "restored.yaml", "raw.yaml", "snapshot.yaml", "claim.yaml"):
        story.asked(f"kubectl delete -f {manifest}")
        kubectl.delete(manifest)
    for kind in ("pv", "volumeattachments", "vdusevolumes", "volumesnapshotcontents"):
        kubectl.wait_until(lambda kind=kind: not kubectl.objects(kind), f"there are no {kind}")  # type: ignore[misc]
        story.check(not kubectl.objects(kind), f"the API has no {kind}")
    for machine in shown.machines:
        for what, command in _LEFT.items():
            left = machine.run("sh", "-c", command, check=False).stdout
            story.check(
                not left.strip(), f"{machine.node.name} has no {what}" + (f": {left}" if left.strip() else "")
            )


STEPS = (install, claim, write, look, expand, snapshot, raw_block, come_back, clean_up)


def _nodes(shown: Shown) -> set[str]:
    return {node.name for node in shown.cluster.layout.nodes}


def _registered(shown: Shown) -> set[str]:
    return {
        o["metadata"]["name"]
        for o in shown.kubectl.objects("csinodes")
        if any(driver["name"] == DRIVER for driver in o["spec"]["drivers"] or [])
    }


def _size_bytes(kubectl: Kubectl) -> int:
    return int(kubectl.sh("writer", "df -k /data | tail -1").split()[1]) * 1024


def same(shown: Shown, pod: str, claim: str) -> None:
    """The file that the story's writer wrote is what the pod reads."""
    read = shown.kubectl.sh(pod, "sha256sum </data/file")
    shown.story.check(read == shown.checksums["writer"], f"{claim} (sha256 {read[:12]}...)")
