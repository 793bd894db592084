"""Builds Kubernetes' storage tests and their helper program agnhost, from a Go module of its own (lab/cluster/e2e).

The result's folder has: `e2e.test` (lab.storage_suite runs it), `images/` (the images that its pods ask for). What is
kept true: the tests are those of the Kubernetes that the cluster runs, and every image has the name that they ask for.
"""

import tempfile
from pathlib import Path

from lab.cluster import small_images
from lab.cluster.built import built, digest
from lab.cluster.kubernetes import GO, require_go
from lab.cluster.layout import KUBERNETES
from lab.errors import LabSetupError
from lab.host import run
from lab.paths import CHECKOUT

MODULE = CHECKOUT / "lab" / "cluster" / "e2e"
_BUILD_S = 7200.0
_LIST_S = 120.0
_FLAGS = ["-trimpath", f"-ldflags=-s -w -X k8s.io/component-base/version.gitVersion=v{KUBERNETES}"]


def obtain() -> Path:
    """The folder with the result, built if it is not in the cache.

    Raises LabSetupError when Go is missing or the build fails.
    """
    require_go()
    files = [MODULE / name for name in ("go.mod", "go.sum", "suite_test.go")]
    shell = digest(files=[small_images.BUSYBOX])
    key = digest([*_FLAGS, *small_images.SUITE_IMAGES, shell], files, MODULE)
    return built("storage-suite", key, _build)


def _build(target: Path) -> None:
    program = target / "e2e.test"
    with tempfile.TemporaryDirectory(prefix=".go-", dir=target.parent) as work:
        run(["go", "test", "-c", *_FLAGS, "-o", str(program), "."], timeout_s=_BUILD_S, cwd=MODULE, env=GO)
        # `tool`: agnhost, which go.mod lists as one because its package cannot be imported.
        run(["go", "build", *_FLAGS, "-o", work, "tool"], timeout_s=_BUILD_S, cwd=MODULE, env=GO)
        asked = run([str(program), "--list-images"], timeout_s=_LIST_S).split()
        if unknown := set(small_images.SUITE_IMAGES) - set(asked):
            raise LabSetupError(f"the storage tests of Kubernetes {KUBERNETES} do not ask for {unknown}")
        (target / "images").mkdir()
        small_images.write_suite_images(Path(work, "agnhost"), target / "images")
