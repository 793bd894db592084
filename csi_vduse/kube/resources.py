"""Names of what we keep in the Kubernetes API, and the paths of what else we touch. Pure.

The schemas are in deploy/helm/csi-vduse/templates/crds/; volumes/kubernetes_objects.py maps our values to them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

GROUP = "csi.vduse.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
# Keeps an object until its node has removed what it stands for; the leading controller takes it off.
FINALIZER = f"{GROUP}/data"

Object = dict[str, Any]


@dataclass(frozen=True)
class Resource:
    """A kind of object in the API.

    Args:
        kind: as in `kind:`.
        base: path of the collection, without a slash at its end.
    """

    kind: str
    base: str

    def named(self, name: str) -> str:
        """Return the path of one object."""
        return f"{self.base}/{name}"

    def status(self, name: str) -> str:
        """Return the path of its status subresource."""
        return f"{self.base}/{name}/status"


VOLUMES = Resource("VduseVolume", f"/apis/{API_VERSION}/vdusevolumes")
SNAPSHOTS = Resource("VduseSnapshot", f"/apis/{API_VERSION}/vdusesnapshots")
NODES = Resource("VduseNode", f"/apis/{API_VERSION}/vdusenodes")
CORE_NODES = Resource("Node", "/api/v1/nodes")
PODS = Resource("Pod", "/api/v1/pods")
PERSISTENT_VOLUMES = Resource("PersistentVolume", "/api/v1/persistentvolumes")


def leases(namespace: str) -> Resource:
    """Return the leases of a namespace."""
    return Resource("Lease", f"/apis/coordination.k8s.io/v1/namespaces/{namespace}/leases")


def events(namespace: str) -> Resource:
    """Return the events of a namespace; those about cluster-wide objects belong to "default"."""
    return Resource("Event", f"/apis/events.k8s.io/v1/namespaces/{namespace}/events")


def name_of(found: Object) -> str:
    """Return an object's name."""
    name: str = found["metadata"]["name"]
    return name


def version_of(found: Object) -> str:
    """Return an object's resourceVersion: opaque, only ever compared by the server."""
    version: str = found["metadata"].get("resourceVersion", "")
    return version


def is_going(found: Object) -> bool:
    """Tell whether an object was deleted and waits for its finalizers."""
    return "deletionTimestamp" in found["metadata"]
