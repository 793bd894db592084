"""kubectl as the demo uses it: apply, wait, look, run in a pod.

What is kept true: every wait has an end, and a wait that ends in vain says what it waited for.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lab.cluster.cluster import Cluster
from lab.errors import LabError

MANIFESTS = Path(__file__).parent / "manifests"
WAIT_S = 1800
"""Seconds; a pod is running some ten seconds after it was asked for, on an emulated node that has nothing else to do.
On a busy machine the first container of an image alone takes minutes."""


class Kubectl:
    """kubectl in one namespace of one cluster."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        """Everything happens in `namespace`, which must exist when something is applied."""
        self._cluster = cluster
        self._namespace = namespace

    def __call__(self, *words: str) -> str:
        """Run it and return what it printed, without the last newline."""
        return self._cluster.kubectl("--namespace", self._namespace, *words, timeout_s=WAIT_S + 60).rstrip()

    def apply(self, manifest: str) -> None:
        """Apply one of the demo's manifests."""
        self("apply", "-f", str(MANIFESTS / manifest))

    def apply_text(self, manifest: str) -> None:
        """Apply a manifest that is not among the demo's."""
        with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
            file.write(manifest)
            file.flush()
            self("apply", "-f", file.name)

    def delete(self, manifest: str) -> None:
        """Delete what a manifest describes, and wait until it is gone."""
        self("delete", "-f", str(MANIFESTS / manifest), "--ignore-not-found", f"--timeout={WAIT_S}s")

    def object(self, kind: str, name: str) -> Any:  # noqa: ANN401 -- JSON
        """One object."""
        return json.loads(self("get", kind, name, "-o", "json"))

    def objects(self, kind: str, *options: str) -> list[Any]:
        """All objects of a kind, in the namespace if the kind is namespaced."""
        return list(json.loads(self("get", kind, *options, "-o", "json"))["items"])

    def succeeds(self, *words: str) -> bool:
        """Whether a command succeeds."""
        try:
            self(*words)
        except LabError:
            return False
        return True

    def wait_ready(self, pod: str) -> None:
        """Wait until a pod is Ready.

        Raises LabError with what Kubernetes says about it.
        """
        try:
            self("wait", "--for=condition=Ready", f"pod/{pod}", f"--timeout={WAIT_S}s")
        except LabError as error:
            raise LabError(f"{error}\n{self('describe', 'pod', pod)}") from error

    def sh(self, pod: str, script: str) -> str:
        """Run a shell script in a pod's container and return what it printed."""
        return self("exec", pod, "--", "sh", "-c", script)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Ask again and again, until the condition holds.

        Raises LabError when it does not within WAIT_S.
        """
        deadline = time.monotonic() + WAIT_S
        while not condition():
            if time.monotonic() > deadline:
                raise LabError(f"waited {WAIT_S} s in vain until {what}")
            time.sleep(0.5)
