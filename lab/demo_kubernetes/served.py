"""Volumes that a vhost-user server of the node serves: a storage server on each node, killed under a pod that writes."""

import sys
from pathlib import Path

from lab.demo_kubernetes import helm
from lab.demo_kubernetes.life import Shown, same
from lab.paths import CHECKOUT

_VALUES = CHECKOUT / "lab" / "demo_kubernetes" / "values-served.yaml"
_POD = "served"
_RUN_DIR = "/run/csi-vduse-storage"
_DIRECTORY = "/var/lib/csi-vduse/served"
_SERVER = Path(sys.executable).parent / "csi-vduse"
_START = (
    f"mkdir -p {_DIRECTORY} {_RUN_DIR}; setsid {_SERVER} storage-server --directory {_DIRECTORY} --run-dir {_RUN_DIR} "
    f"--control unix:{_RUN_DIR}/control.sock --no-tls --vhost-user {_RUN_DIR}/disks "
    f">>/var/log/storage-server 2>&1 </dev/null & until [ -S {_RUN_DIR}/control.sock ]; do sleep 0.1; done"
)
_START_ANEW = f"rm -f {_RUN_DIR}/control.sock; {_START}"
_LEFT = f"ls {_RUN_DIR}/disks; find {_DIRECTORY} -name 'image.*'"
_MORE = "dd if=/dev/urandom of=/data/more bs=1M count=8 conv=fsync 2>/dev/null; sha256sum </data/more"


def serve(shown: Shown) -> None:
    """A storage server on each node, and a release of the driver that knows it."""
    story = shown.story
    story.step("Start a storage server on each node, and tell the driver of it")
    for machine in shown.machines:
        machine.run("sh", "-c", _START)
    story.asked(f"helm upgrade {helm.RELEASE} ... --values {_VALUES.name}")
    helm.release(shown.cluster, values=(helm.VALUES, _VALUES))
    story.seen(shown.kubectl("get", "storageclass"))


def write(shown: Shown) -> None:
    """A pod writes to such a volume."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Write 16 MiB in a pod")
    story.asked("kubectl apply -f served.yaml")
    kubectl.apply("served.yaml")
    kubectl.wait_ready(_POD)
    shown.checksums["writer"] = kubectl.sh(
        _POD, "dd if=/dev/urandom of=/data/file bs=1M count=16 conv=fsync 2>/dev/null; sha256sum </data/file"
    )
    story.seen(kubectl("get", "vdusevolumes", "-o", "wide"))
    backends = {volume["spec"]["backend"] for volume in kubectl.objects("vdusevolumes")}
    story.check("qsd" in backends, "its volume is of the storage server on its node")


def kill(shown: Shown) -> None:
    """The process that has the volume dies, and then the storage server with it."""
    story, kubectl = shown.story, shown.kubectl
    story.step("kill -9 the server of the volume, twice, while the pod writes on")
    # The storage server starts another daemon; of itself there is nobody who starts another.
    for victims, then in (("qemu-storage-daemon", ":"), ("storage-server|qemu-storage-daemon", _START_ANEW)):
        for machine in shown.machines:
            machine.run("pkill", "-9", "-f", victims, check=False)
            machine.run("sh", "-c", then)
        wrote = kubectl.sh(_POD, _MORE)
        for machine in shown.machines:
            machine.run("sysctl", "-q", "vm.drop_caches=3")
        read = kubectl.sh(_POD, "sha256sum </data/more")
        story.check(wrote == read, f"{victims}: the pod writes on, without error")
        same(shown, _POD, "what it wrote before is as it was")


def come_back(shown: Shown) -> None:
    """Another pod of the claim reads what is on the disk, not in a cache."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Delete the pod and make it again")
    kubectl("delete", "pod", _POD, "--wait=true")
    kubectl.apply("served.yaml")
    kubectl.wait_ready(_POD)
    same(shown, _POD, "the data is intact")


def clean_up(shown: Shown) -> None:
    """Delete everything, and see that the server has nothing left."""
    story, kubectl = shown.story, shown.kubectl
    story.step("Delete everything")
    kubectl.delete("served.yaml")
    kubectl.wait_until(lambda: not kubectl.objects("vdusevolumes"), "there are no vdusevolumes")
    for machine in shown.machines:
        left = machine.run("sh", "-c", _LEFT, check=False).stdout
        story.check(not left.strip(), f"no socket and no image is left {left.strip()}")
        machine.run("pkill", "-f", "storage-server", check=False)
    helm.release(shown.cluster)


STEPS = (serve, write, kill, come_back, clean_up)
