"""Helm as the stories use it: release a version of the chart, and wait until all of it is there."""

from collections.abc import Sequence
from pathlib import Path

from lab.cluster.cluster import Cluster
from lab.demo_kubernetes.kubectl import WAIT_S, Kubectl
from lab.host import run
from lab.paths import CHECKOUT

CHART = CHECKOUT / "deploy" / "helm" / "csi-vduse"
VALUES = CHECKOUT / "lab" / "demo_kubernetes" / "values.yaml"
RELEASE = "csi-vduse"
NAMESPACE = "csi-vduse"
_WORKLOADS = (f"daemonset/{RELEASE}-agent", f"daemonset/{RELEASE}-node", f"deployment/{RELEASE}-controller")


def release(cluster: Cluster, *options: str, values: Sequence[Path] = (VALUES,)) -> None:
    """Install the chart, or upgrade what is installed, and wait until it is rolled out."""
    files = [f"--values={file}" for file in values]
    _helm(cluster, "upgrade", "--install", RELEASE, str(CHART), *files, *options)
    wait(cluster)


def rollback(cluster: Cluster) -> None:
    """Go back to the revision before, and wait until it is rolled out."""
    _helm(cluster, "rollback", RELEASE)
    wait(cluster)


def wait(cluster: Cluster) -> None:
    """Wait until every part of the driver runs as the release says."""
    for workload in _WORKLOADS:
        Kubectl(cluster, NAMESPACE)("rollout", "status", workload, f"--timeout={WAIT_S}s")


def _helm(cluster: Cluster, *words: str) -> None:
    argv = [str(cluster.layout.helm), *words, "--namespace", NAMESPACE, "--wait", "--timeout", f"{WAIT_S}s"]
    run(argv, timeout_s=WAIT_S + 60)
