"""What a cluster consists of: names, addresses and folders. Values only; nothing here acts.

What is kept true: everything of one cluster hangs on its name (network namespace, machines, folders), so that two
clusters do not meet; the addresses may be the same in each, because no namespace sees another.
"""

from dataclasses import dataclass
from pathlib import Path

from lab.paths import cache_dir, results_dir
from lab.tap import Nic

KUBERNETES = "1.36.3"
HOST_ADDRESS = "10.200.0.1"
API_PORT = 443
"""Also the port of the Service `kubernetes`, so that its address can be an address of the host's (see network)."""
SERVICES = "10.96.0.0/16"
API_SERVICE = "10.96.0.1"
PODS = "10.201.0.0/16"
PAUSE_IMAGE = "registry.k8s.io/pause:3.10.1"


@dataclass(frozen=True)
class Node:
    """One node: the name it has in Kubernetes, and its number from 1, which its addresses are made of."""

    cluster: str
    number: int

    @property
    def name(self) -> str:
        """Its name in Kubernetes."""
        return f"node-{self.number}"

    @property
    def machine(self) -> str:
        """Its name in the laboratory."""
        return f"{self.cluster}-{self.name}"

    @property
    def address(self) -> str:
        """Its address on the cluster's bridge."""
        return f"10.200.0.{10 + self.number}"

    @property
    def pods(self) -> str:
        """The subnet of its pods."""
        return f"10.201.{self.number}.0/24"

    @property
    def nic(self) -> Nic:
        """Its card on the bridge."""
        return Nic(f"csi-vduse-{self.cluster}", f"tap{self.number}", f"52:54:00:c5:00:{self.number:02x}")


@dataclass(frozen=True)
class Layout:
    """One cluster, by its name."""

    name: str = "dev"
    node_count: int = 2

    @property
    def namespace(self) -> str:
        """The network namespace of its bridge, and of its control plane."""
        return f"csi-vduse-{self.name}"

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Its nodes."""
        return tuple(Node(self.name, number) for number in range(1, self.node_count + 1))

    @property
    def folder(self) -> Path:
        """Its certificates, kubeconfigs and etcd; gone with the cluster."""
        return cache_dir() / "clusters" / self.name

    @property
    def programs(self) -> Path:
        """The folder of the programs that it runs."""
        return self.folder / "bin"

    @property
    def logs(self) -> Path:
        """The logs of its control plane and nodes; stays after the cluster, until the next of its name."""
        return results_dir() / f"cluster-{self.name}"

    @property
    def kubectl(self) -> Path:
        """A script that runs kubectl on this cluster as its administrator."""
        return self.folder / "kubectl"

    @property
    def helm(self) -> Path:
        """A script that runs helm on this cluster as its administrator."""
        return self.folder / "helm"

    def inside(self, *argv: str) -> list[str]:
        """The command, run in the cluster's network."""
        return ["nsenter", f"--net=/run/netns/{self.namespace}", "--", *argv]
