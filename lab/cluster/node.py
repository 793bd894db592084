"""A node of the cluster: a machine of the laboratory that runs containerd and kubelet.

`lab/guest/node.sh` does in the guest what this file asks for. What is kept true: a node's configuration is one file in
the cluster's folder, so that any process can act on any node of a running cluster, and a node whose power was cut
comes back as it was, with its disk.
"""

import shlex
from collections.abc import Sequence
from pathlib import Path

from lab.channel import Completed
from lab.cluster.layout import API_PORT, HOST_ADDRESS, PAUSE_IMAGE, SERVICES, Layout, Node
from lab.machine import GIB, Machine
from lab.paths import GUEST_SCRIPTS

MEMORY = "3G"
DISK_BYTES = 16 * GIB
"""Size of the sparse file; a node with all images on it uses about 2 GiB."""
UP_S = 900.0
_KUBELET_PORT = 10250


class NodeMachine:
    """One node of one cluster."""

    def __init__(self, layout: Layout, node: Node) -> None:
        """Describe it; nothing happens."""
        self.node = node
        self._layout = layout
        self._configuration = layout.folder / f"{node.name}.conf"

    def boot(self, kube: Path) -> None:
        """Boot a new machine and leave it running, whoever started it. kube: the program that has kubelet in it.

        Raises BootError.
        """
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        self._configuration.write_text(configuration(self._layout, self.node, kube))
        machine = Machine(
            self.node.machine,
            memory=MEMORY,
            disk_bytes=DISK_BYTES,
            scratch_bytes=GIB // 4,
            nic=self.node.nic,
        )
        machine.boot()
        machine.detach()

    def up(self) -> None:
        """Make the booted machine a node: network, disk, containerd, kubelet.

        Raises CommandFailed.
        """
        self._script("up")

    def import_images(self, archives: Sequence[Path]) -> None:
        """Import image archives into the node's containerd."""
        self._script("import", *map(str, archives))

    def start(self, service: str) -> None:
        """Start `containerd` or `kubelet`."""
        self._script("start", service)

    def kill(self, service: str) -> None:
        """Kill `containerd` or `kubelet` with SIGKILL; containers go on."""
        self._script("kill", service)

    def kill_container(self, identifier: str) -> None:
        """Kill the first process of a container with SIGKILL."""
        containerd = ("ctr", "--address", "/run/containerd/containerd.sock", "--namespace", "k8s.io")
        self.run(*containerd, "tasks", "kill", "--signal", "SIGKILL", identifier)

    def cut_off(self) -> None:
        """Let nothing pass any more between the node and the control plane, until its next start."""
        for port in (f"dport {API_PORT}", f"sport {_KUBELET_PORT}"):
            self.run("ip", "rule", "add", "blackhole", "ipproto", "tcp", *port.split())

    def power_off(self) -> Machine:
        """Cut the node's power: no mercy for what was in memory. What is returned is for `power_on`."""
        machine = self.machine()
        machine.power_cut()
        return machine

    def power_on(self, machine: Machine) -> None:
        """Boot it again, with the same disk."""
        machine.boot()
        machine.detach()
        self.up()

    def run(self, *argv: str, check: bool = True) -> Completed:
        """Run a command on the node.

        Raises CommandFailed, unless `check` is false.
        """
        return self.machine().run(argv, check=check, timeout_s=UP_S)

    def machine(self) -> Machine:
        """The running machine.

        Raises LabError when it does not run.
        """
        return Machine.find(self.node.machine, nic=self.node.nic)

    def _script(self, *words: str) -> None:
        self.run(str(GUEST_SCRIPTS / "node.sh"), str(self._configuration), *words)


def configuration(layout: Layout, node: Node, kube: Path) -> str:
    """What `guest/node.sh` needs to know, as shell assignments."""
    settings = {
        "name": node.name,
        "card": node.nic.mac,
        "address": node.address,
        "pods": node.pods,
        "peers": " ".join(f"{peer.pods}={peer.address}" for peer in layout.nodes if peer != node),
        "gateway": HOST_ADDRESS,
        "services": SERVICES,
        "disk": Machine.DISK,
        "kube": str(kube),
        "pause": PAUSE_IMAGE,
        "folder": str(layout.folder),
        "logs": str(layout.logs),
    }
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in settings.items())
