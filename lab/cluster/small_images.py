"""The small images that the lab itself needs: the pause container, a shell for test pods, those of the storage suite.

All are Debian's static busybox; agnhost has its own program besides. As a pause container busybox sleeps; containerd
ends a sandbox with SIGKILL, so nothing waits for it. What is kept true: they have the upstream names that containerd
and people expect; those of the suite (lab.cluster.suite) are apart, because only who runs it wants them.
"""

import subprocess
from pathlib import Path

from lab.cluster.built import built, digest
from lab.cluster.image_archive import Image, write_archive
from lab.cluster.layout import PAUSE_IMAGE

SHELL_IMAGE = "docker.io/library/busybox:1.37"
BUSYBOX = Path("/bin/busybox")
_AGNHOST = "registry.k8s.io/e2e-test-images/agnhost:2.63.0"
_SUITE_SHELLS = {
    "busybox": "registry.k8s.io/e2e-test-images/busybox:1.37.0-1",
    "nginx": "registry.k8s.io/e2e-test-images/nginx:1.15-4",
    "glibc": "registry.k8s.io/e2e-test-images/glibc-dns-testing:2.0.0",
}
"""Images that the storage suite only runs shell commands in, by the names of their archives."""
SUITE_IMAGES = (_AGNHOST, *_SUITE_SHELLS.values())


def obtain() -> Path:
    """The folder with the archives, without those of the storage suite."""
    key = digest([PAUSE_IMAGE, SHELL_IMAGE], [BUSYBOX])
    return built("test-images", key, _build)


def write_suite_images(agnhost: Path, target: Path) -> None:
    """Write the archives of the storage suite's images into the folder `target`; agnhost: its program."""
    files, links = {"/bin/busybox": BUSYBOX}, _links()
    for name, image in _SUITE_SHELLS.items():
        write_archive(Image(image, files, links, command=("sh",)), target / f"{name}.tar")
    write_archive(
        Image(_AGNHOST, {**files, "/agnhost": agnhost}, links, entrypoint=("/agnhost",), command=("pause",)),
        target / "agnhost.tar",
    )


def _build(target: Path) -> None:
    files, links = {"/bin/busybox": BUSYBOX}, _links()
    write_archive(
        Image(PAUSE_IMAGE, files, links, entrypoint=("/bin/sleep", "2147483647")), target / "pause.tar"
    )
    write_archive(Image(SHELL_IMAGE, files, links, command=("sh",)), target / "shell.tar")


def _links() -> dict[str, str]:
    listed = subprocess.run([BUSYBOX, "--list"], capture_output=True, text=True, timeout=60, check=True)
    return {f"/bin/{name}": "busybox" for name in listed.stdout.split() if name != "busybox"}
