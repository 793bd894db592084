"""What a storage server beside the cluster needs: a directory, and certificates for it and its clients.

The certificates are of an authority of its own, under the names that QEMU wants (docs/storage-server.md). What is kept
true: `lay` leaves images alone, and makes the certificates once.
"""

from pathlib import Path

from lab.cluster.certificates import Authority, Identity
from lab.cluster.layout import HOST_ADDRESS, Layout

IMAGES = "storage"
SERVER = "storage-server"
CONTROLLER = "csi-vduse-controller"
NODE = "csi-vduse-node"


def lay(layout: Layout) -> None:
    """Make the directory, and a folder of certificates each for the server, the controller, and the nodes."""
    (layout.folder / IMAGES).mkdir(exist_ok=True)
    authority_folder = layout.folder / "storage-authority"
    if authority_folder.exists():
        return
    authority_folder.mkdir()
    authority = Authority(authority_folder)
    for identity in (
        Identity(SERVER, "storage", addresses=(HOST_ADDRESS,)),
        Identity(CONTROLLER, CONTROLLER),
        Identity(NODE, NODE),
    ):
        authority.issue(identity)
        role = "server" if identity.addresses else "client"
        folder = layout.folder / identity.file
        folder.mkdir()
        for made, name in (
            (authority.file, "ca-cert.pem"),
            (authority_folder / f"{identity.file}.crt", f"{role}-cert.pem"),
            (authority_folder / f"{identity.file}.key", f"{role}-key.pem"),
        ):
            _copy(made, folder / name)


def _copy(source: Path, target: Path) -> None:
    target.touch(mode=0o600)
    target.write_bytes(source.read_bytes())
