"""Who may do what in the cluster: certificates of its programs and people, and their kubeconfigs.

What is kept true: `lay` makes all of it anew, in the cluster's own folder, before anything runs.
"""

import json
import os
import shlex
from pathlib import Path

from lab.cluster.certificates import Authority, Identity, write_key
from lab.cluster.layout import API_PORT, API_SERVICE, HOST_ADDRESS, Layout

ADMIN = "admin"


def identities(layout: Layout) -> list[Identity]:
    """Everyone who gets a certificate. Names and groups: Kubernetes' own bootstrap roles."""
    service = "kubernetes.default"
    served = (HOST_ADDRESS, API_SERVICE, "127.0.0.1", "localhost", service, f"{service}.svc")
    return [
        Identity("apiserver", "kube-apiserver", addresses=served),
        Identity("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters"),
        Identity(ADMIN, "admin", "system:masters"),
        Identity("kube-controller-manager", "system:kube-controller-manager"),
        Identity("kube-scheduler", "system:kube-scheduler"),
        Identity("snapshot-controller", "snapshot-controller", "system:masters"),
        *(Identity(n.name, f"system:node:{n.name}", "system:nodes") for n in layout.nodes),
    ]


def lay(layout: Layout, kube: Path, helm: Path) -> None:
    """Write certificates, kubeconfigs, and the scripts `kubectl` and `helm`, into the cluster's folder."""
    folder = layout.folder
    folder.mkdir(parents=True, exist_ok=True)
    authority = Authority(folder)
    for identity in identities(layout):
        authority.issue(identity)
        if not identity.addresses:
            (folder / f"{identity.file}.kubeconfig").write_text(kubeconfig(folder, identity.file))
    write_key(folder / "service-accounts.key")
    admin = folder / f"{ADMIN}.kubeconfig"
    _script(layout.kubectl, layout, admin, [str(kube), "kubectl"])
    _script(layout.helm, layout, admin, [str(helm)])


def kubeconfig(folder: Path, identity: str) -> str:
    """How that identity reaches the API server; JSON, which is YAML too."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [
            {
                "name": "lab",
                "cluster": {
                    "server": f"https://{HOST_ADDRESS}:{API_PORT}",
                    "certificate-authority": str(folder / "ca.crt"),
                },
            }
        ],
        "users": [
            {
                "name": identity,
                "user": {
                    "client-certificate": str(folder / f"{identity}.crt"),
                    "client-key": str(folder / f"{identity}.key"),
                },
            }
        ],
        "contexts": [{"name": "lab", "context": {"cluster": "lab", "user": identity}}],
        "current-context": "lab",
    }
    return json.dumps(config, indent=1)


def _script(path: Path, layout: Layout, admin: Path, program: list[str]) -> None:
    command = shlex.join(layout.inside(*program))
    path.write_text(f'#!/bin/sh\nKUBECONFIG={shlex.quote(str(admin))} exec {command} "$@"\n')
    os.chmod(path, 0o755)  # noqa: PTH101, S103 -- a script for whoever runs the lab
