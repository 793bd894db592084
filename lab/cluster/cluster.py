"""The cluster as a whole: up, down, and what stands on it.

`up` reads as the list of steps that it prints. What is kept true: a cluster is up as a whole or, after a failure, kept
as it is, with its logs collected, for whoever wants to look; `down` ends whatever there is of it.
"""

import contextlib
import shutil
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from lab.cluster import access, bundle, kubernetes, network, product_image, small_images
from lab.cluster.control_plane import ControlPlane
from lab.cluster.layout import Layout
from lab.cluster.node import NodeMachine
from lab.cluster.steps import step
from lab.errors import LabError
from lab.host import run
from lab.machine import Machine
from lab.paths import CHECKOUT

_APPLY_S = 300.0
_READY_S = 900.0
_HELM_S = 1800.0


@dataclass(frozen=True)
class Built:
    """What a cluster is made of.

    kubernetes: the folder of lab.cluster.kubernetes; images: the archives of all images, the product's last.
    """

    kubernetes: Path
    helm: Path
    images: tuple[Path, ...]


class Cluster:
    """One cluster, up or not."""

    def __init__(self, layout: Layout) -> None:
        """Describe it; nothing happens."""
        self.layout = layout

    @property
    def version(self) -> str:
        """The product's version, which is its image's tag."""
        project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
        return str(project["project"]["version"])

    def build(self) -> Built:
        """Make what a cluster is made of, as far as the cache lacks it."""
        with step("kernel"):
            Machine().prepare()
        with step("helm"):
            helm = Path(run([str(CHECKOUT / "tools" / "build_helm.sh")], timeout_s=_HELM_S).strip())
        made = kubernetes.obtain()
        product = product_image.obtain(self.version) / "image.tar"
        images = [*small_images.obtain().glob("*.tar"), *(made / "images").glob("*.tar"), product]
        return Built(made, helm, tuple(images))

    def up(self) -> None:
        """Bring it up: two Ready nodes that have every image, and an API that has the snapshot kinds.

        Raises LabError; the logs are collected then.
        """
        built = self.build()
        layout = self.layout
        with step("network"):
            network.lay(layout)
        try:
            shutil.rmtree(layout.logs, ignore_errors=True)
            with step("all, without building"), ThreadPoolExecutor() as pool:
                with step("certificates and kubeconfigs"):
                    kube = self._take_programs(built.kubernetes)
                    access.lay(layout, kube, built.helm)
                machines = [NodeMachine(layout, node) for node in layout.nodes]
                booting = [pool.submit(self._boot, machine, kube) for machine in machines]
                self._start_control_plane(ControlPlane(layout), built.kubernetes / "crds")
                for boot in booting:
                    boot.result()
                importing = [pool.submit(self._fill, machine, built.images) for machine in machines]
                for import_ in importing:  # first: it fails at once if a node is gone
                    import_.result()
                for node in layout.nodes:
                    with step(f"{node.name} is Ready"):
                        self.kubectl("wait", "--for=create", f"node/{node.name}", "--timeout=10m")
                        self.kubectl("wait", "--for=condition=Ready", f"node/{node.name}", "--timeout=10m")
        except BaseException:
            bundle.collect(layout)
            raise

    def ensure_up(self) -> None:
        """Bring it up, unless it is; raises as `up` does."""
        if not network.exists(self.layout):
            self.up()

    def down(self) -> None:
        """End it: the nodes, the control plane, the network, the folder. The logs stay."""
        with step("down"):
            for node in self.layout.nodes:
                with contextlib.suppress(LabError):  # one that does not run
                    Machine.find(node.machine).stop()
            network.remove(self.layout)
            shutil.rmtree(self.layout.folder, ignore_errors=True)

    def kubectl(self, *words: str, timeout_s: float = _READY_S) -> str:
        """Run kubectl as the administrator and return what it printed.

        Raises LabSetupError with its last lines when it fails.
        """
        return run([str(self.layout.kubectl), *words], timeout_s=timeout_s)

    def _take_programs(self, built: Path) -> Path:
        """Links of our own: the cache may be emptied, or get newer ones, while the cluster runs."""
        programs = self.layout.programs
        programs.mkdir(parents=True)
        for program in ("kube", "snapshot-controller"):
            (programs / program).hardlink_to(built / program)
        return programs / "kube"

    def _start_control_plane(self, plane: ControlPlane, crds: Path) -> None:
        with step("etcd and API server"):
            plane.start_api()
        with step("controller manager, scheduler, snapshot kinds and controller"):
            plane.start_controllers()
            self.kubectl("apply", "--kustomize", str(crds), timeout_s=_APPLY_S)
            plane.start("snapshot-controller")

    @staticmethod
    def _boot(machine: NodeMachine, kube: Path) -> None:
        with step(f"{machine.node.name} boots"):
            machine.boot(kube)
        with step(f"{machine.node.name} starts containerd and kubelet"):
            machine.up()

    @staticmethod
    def _fill(machine: NodeMachine, images: Sequence[Path]) -> None:
        with step(f"{machine.node.name} imports {len(images)} images"):
            machine.import_images(images)
