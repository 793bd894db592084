"""Builds Kubernetes and the CSI sidecars from one Go module (lab/cluster/kube), once per content.

The result's folder has: `kube` (every Kubernetes program), `snapshot-controller`, `images/` (each sidecar as an image
archive under its upstream name), `crds/` (the snapshot API). What is kept true: versions are those of go.mod and
go.sum, and image tags are derived from them.
"""

import json
import os
import re
import shutil
import tempfile
from pathlib import Path

from lab.cluster.built import built, digest
from lab.cluster.image_archive import Image, write_archive
from lab.cluster.layout import KUBERNETES
from lab.errors import LabSetupError
from lab.host import run
from lab.paths import CHECKOUT

MODULE = CHECKOUT / "lab" / "cluster" / "kube"
SIDECARS = {
    "csi-provisioner": "github.com/kubernetes-csi/external-provisioner/v6",
    "csi-attacher": "github.com/kubernetes-csi/external-attacher/v4",
    "csi-resizer": "github.com/kubernetes-csi/external-resizer/v2",
    "csi-snapshotter": "github.com/kubernetes-csi/external-snapshotter/v8",
}
_SNAPSHOT_API = "github.com/kubernetes-csi/external-snapshotter/client/v8"
_FETCH_S, _BUILD_S = 600.0, 3600.0
"""Building takes eight minutes on two idle cores, with nothing in Go's own cache."""
GO = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false -mod=readonly"}


def obtain() -> Path:
    """The folder with the result, built if it is not in the cache.

    Raises LabSetupError when Go is missing or the build fails.
    """
    require_go()
    key = digest(
        [KUBERNETES, *_flags(), *SIDECARS],
        [MODULE / "go.mod", MODULE / "go.sum", MODULE / "main.go"],
        MODULE,
    )
    return built("kubernetes", key, _build)


def require_go() -> None:
    """See that there is something to build Kubernetes with.

    Raises LabSetupError.
    """
    if not shutil.which("go"):
        raise LabSetupError("the cluster lab builds Kubernetes from source: Go 1.26 or newer is needed")


def sidecar_image(name: str, go_mod: str) -> str:
    """The upstream image name of a sidecar, at the version that go.mod pins."""
    found = re.search(rf"^\s*{re.escape(SIDECARS[name])} (v\S+)", go_mod, re.MULTILINE)
    if not found:
        raise LabSetupError(f"{MODULE}/go.mod does not require {SIDECARS[name]}")
    return f"registry.k8s.io/sig-storage/{name}:{found[1]}"


def _flags() -> list[str]:
    """Without a version of its own the API server would call itself v0.0.0-master."""
    named = ("k8s.io/component-base/version", "k8s.io/client-go/pkg/version")
    versions = " ".join(f"-X {package}.gitVersion=v{KUBERNETES}" for package in named)
    return ["-trimpath", f"-ldflags=-s -w {versions}"]


def _build(target: Path) -> None:
    with tempfile.TemporaryDirectory(prefix=".go-", dir=target.parent) as work:
        made = Path(work)
        # `tool`: the sidecars, which go.mod lists as tools because their packages cannot be imported.
        # Go waits for a server that says nothing as long as it takes.
        run(["go", "list", "-deps", ".", "tool"], timeout_s=_FETCH_S, cwd=MODULE, env=GO, attempts=3)
        run(["go", "build", *_flags(), "-o", work, ".", "tool"], timeout_s=_BUILD_S, cwd=MODULE, env=GO)
        for program in ("kube", "snapshot-controller"):
            os.replace(made / program, target / program)  # noqa: PTH105 -- one file system, no copy
        (target / "images").mkdir()
        go_mod = (MODULE / "go.mod").read_text()
        for name in SIDECARS:
            image = Image(sidecar_image(name, go_mod), {f"/{name}": made / name}, entrypoint=(f"/{name}",))
            write_archive(image, target / "images" / f"{name}.tar")
    listed = run(["go", "list", "-m", "-json", _SNAPSHOT_API], timeout_s=120, cwd=MODULE, env=GO)
    shutil.copytree(Path(json.loads(listed)["Dir"], "config", "crd"), target / "crds")
