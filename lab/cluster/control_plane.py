"""The control plane: etcd, API server, controller manager, scheduler and snapshot controller, on the host.

And, when it is started, a storage server of the driver's, which is a machine of its own to the nodes.

Each is a process of its own in the cluster's network namespace, from one binary (lab/cluster/kube), with its log in
the cluster's log folder. What is kept true: a process is found again by its namespace and its argv, not by a number
in a file; etcd is in memory's hands (no fsync) because the cluster ends with the machine it runs on.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from lab import host
from lab.cluster import network, storage
from lab.cluster.layout import API_PORT, HOST_ADDRESS, SERVICES, Layout
from lab.errors import LabError, LabSetupError

READY_S = 300.0
"""For a machine that compiles something beside it: three seconds are usual."""
END_S = 30.0


def programs(layout: Layout) -> dict[str, list[str]]:
    """The argv of each program, in the order of their start."""
    folder = layout.folder
    kube = str(layout.programs / "kube")

    def controller(name: str, *flags: str) -> list[str]:
        config = f"{folder}/{name}.kubeconfig"
        return [
            *(kube, name, f"--kubeconfig={config}", f"--authentication-kubeconfig={config}"),
            *(f"--authorization-kubeconfig={config}", "--bind-address=127.0.0.1", "--leader-elect=false"),
            *flags,
        ]

    return {
        "etcd": [
            *(kube, "etcd", f"--data-dir={folder}/etcd", "--unsafe-no-fsync", "--logger=zap"),
            *("--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379"),
            *("--listen-peer-urls=http://127.0.0.1:2380", "--log-level=warn"),
        ],
        "kube-apiserver": [
            *(kube, "kube-apiserver", "--etcd-servers=http://127.0.0.1:2379"),
            *("--bind-address=0.0.0.0", f"--secure-port={API_PORT}", f"--advertise-address={HOST_ADDRESS}"),
            *(f"--service-cluster-ip-range={SERVICES}", "--allow-privileged=true"),
            *("--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction"),
            *(f"--client-ca-file={folder}/ca.crt", f"--tls-cert-file={folder}/apiserver.crt"),
            f"--tls-private-key-file={folder}/apiserver.key",
            f"--kubelet-client-certificate={folder}/apiserver-kubelet.crt",
            f"--kubelet-client-key={folder}/apiserver-kubelet.key",
            # Nobody is that proxy, but without it the controllers complain twice a minute.
            f"--requestheader-client-ca-file={folder}/ca.crt",
            *("--requestheader-allowed-names=front-proxy", "--requestheader-username-headers=X-Remote-User"),
            *(
                "--requestheader-group-headers=X-Remote-Group",
                "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            ),
            # By name, `kubectl logs` would ask a DNS server that does not exist.
            "--kubelet-preferred-address-types=InternalIP",
            "--service-account-issuer=https://kubernetes.default.svc",
            f"--service-account-key-file={folder}/service-accounts.key",
            f"--service-account-signing-key-file={folder}/service-accounts.key",
        ],
        "kube-controller-manager": controller(
            "kube-controller-manager",
            "--use-service-account-credentials=true",
            f"--service-account-private-key-file={folder}/service-accounts.key",
            f"--root-ca-file={folder}/ca.crt",
            # With the default of 20 its thirty controllers wait five seconds for their tokens.
            *("--kube-api-qps=500", "--kube-api-burst=1000"),
        ),
        "kube-scheduler": controller("kube-scheduler"),
        "storage-server": [
            *(sys.executable, str(Path(sys.executable).with_name("csi-vduse")), "storage-server"),
            *(f"--directory={folder}/{storage.IMAGES}", f"--run-dir={folder}/storage-run"),
            *(f"--control={HOST_ADDRESS}", f"--nbd={HOST_ADDRESS}", f"--tls-dir={folder}/{storage.SERVER}"),
        ],
        "snapshot-controller": [
            *(
                str(layout.programs / "snapshot-controller"),
                f"--kubeconfig={folder}/snapshot-controller.kubeconfig",
            ),
        ],
    }


class ControlPlane:
    """The programs of one cluster."""

    def __init__(self, layout: Layout) -> None:
        """Describe it; nothing starts."""
        self._layout = layout
        self._programs = programs(layout)

    def start(self, name: str) -> None:
        """Start one program, which then has no parent but init; its log is added to.

        Raises LabError when it runs already, or does not start.
        """
        if self.find(name):
            raise LabError(f"{name} runs already")
        self._layout.logs.mkdir(parents=True, exist_ok=True)
        log = self._layout.logs / f"{name}.log"
        with log.open("ab") as output:
            subprocess.run(
                ["setsid", "--fork", *self._layout.inside(*self._programs[name])],
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=True,
            )
        self._wait(lambda: bool(self.find(name)), f"{name} to start; see {log}", END_S)

    def stop(self, name: str, *, kill: bool = False) -> None:
        """End one program, by SIGTERM or at once; nothing happens when it does not run.

        Raises LabError when it does not end.
        """
        for pid in self.find(name):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if kill else signal.SIGTERM)
        self._wait(lambda: not self.find(name), f"{name} to end", END_S)

    def find(self, name: str) -> list[int]:
        """The program's process, if it runs."""
        wanted = self._programs[name]
        return [pid for pid in network.processes(self._layout) if _argv(pid) == wanted]

    def start_api(self) -> None:
        """Start etcd and the API server, and wait until it serves.

        Raises LabError when it does not within READY_S, with the end of its log.
        """
        self.start("etcd")
        self.start("kube-apiserver")
        self.wait_for_api()

    def wait_for_api(self) -> None:
        """Wait until the API server serves.

        Raises LabError when it does not within READY_S, with the end of its log.
        """
        self._wait(self._api_ready, "the API server to be ready", READY_S)

    def start_controllers(self) -> None:
        """Start what works on the API server's content."""
        for name in ("kube-controller-manager", "kube-scheduler"):
            self.start(name)

    def _api_ready(self) -> bool:
        for name in ("etcd", "kube-apiserver"):
            if not self.find(name):
                end = host.tail(self._layout.logs / f"{name}.log", 10)
                raise LabError(f"{name} ended; its log ends:\n{end}")
        try:
            host.run([str(self._layout.kubectl), "get", "--raw=/readyz"], timeout_s=30)
        except LabSetupError:
            return False
        return True

    @staticmethod
    def _wait(condition: Callable[[], bool], what: str, timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        while not condition():
            if time.monotonic() > deadline:
                raise LabError(f"waited {timeout_s:g} s in vain for {what}")
            time.sleep(0.1)


def _argv(pid: int) -> list[str]:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().split("\0")[:-1]
    except (FileNotFoundError, ProcessLookupError):
        return []
