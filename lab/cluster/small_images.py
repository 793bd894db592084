"""The small images that the lab itself needs: the pause container, and a shell for test pods.

Both are Debian's static busybox. As a pause container it sleeps; containerd ends a sandbox with SIGKILL, so nothing
waits for it. What is kept true: they have the upstream names that containerd and people expect.
"""

import subprocess
from pathlib import Path

from lab.cluster.built import built, digest
from lab.cluster.image_archive import Image, write_archive
from lab.cluster.layout import PAUSE_IMAGE

SHELL_IMAGE = "docker.io/library/busybox:1.37"
_BUSYBOX = Path("/bin/busybox")


def obtain() -> Path:
    """The folder with the archives."""
    key = digest([PAUSE_IMAGE, SHELL_IMAGE], [_BUSYBOX])
    return built("test-images", key, _build)


def _build(target: Path) -> None:
    listed = subprocess.run([_BUSYBOX, "--list"], capture_output=True, text=True, timeout=60, check=True)
    links = {f"/bin/{name}": "busybox" for name in listed.stdout.split() if name != "busybox"}
    files = {"/bin/busybox": _BUSYBOX}
    write_archive(
        Image(PAUSE_IMAGE, files, links, entrypoint=("/bin/sleep", "2147483647")), target / "pause.tar"
    )
    write_archive(Image(SHELL_IMAGE, files, links, command=("sh",)), target / "shell.tar")
