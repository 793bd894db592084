"""A kernel with VDUSE, from Debian's archive, without installing anything on the host.

`LAB_KERNEL` chooses: `6.12` (the default), `sid` (the newest, with VDUSE API version 1), or the path of a
`vmlinuz` inside a tree that has `lib/modules`. What is kept true: a kernel's folder in the cache is either
complete (it appears by one rename) or absent; its modules are unpacked and indexed, because virtme-ng's
initramfs cannot load compressed ones.
"""

import lzma
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from lab.archive import Release, unpack_kernel
from lab.errors import LabSetupError
from lab.host import run
from lab.paths import cache_dir


@dataclass(frozen=True)
class Kernel:
    """A bootable kernel: its release, its image, and the tree that has its `lib/modules`."""

    release: str
    image: Path
    root: Path


def obtain(choice: str | None = None) -> Kernel:
    """The kernel that `choice` (default: `$LAB_KERNEL`, then `6.12`) names, downloaded if needed.

    Raises LabSetupError when it cannot be had.
    """
    choice = choice or os.environ.get("LAB_KERNEL") or "6.12"
    if choice == "6.12":
        bookworm = Release("bookworm", security=True)
        return _from_archive(choice, "linux-image-6.12-cloud-amd64", bookworm, host_first=True)
    if choice == "sid":
        sid = Release("sid", security=False)
        return _from_archive(choice, "linux-image-cloud-amd64", sid, host_first=False)
    path = Path(choice)
    if path.is_file():
        return _from_tree(path.resolve().parent.parent)
    raise LabSetupError(f"LAB_KERNEL={choice}: neither `6.12`, `sid` nor the path of a vmlinuz")


def _from_archive(name: str, metapackage: str, release: Release, *, host_first: bool) -> Kernel:
    root = cache_dir() / "kernels" / name
    if not root.is_dir():
        root.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=root.parent) as work:
            unpacked = Path(work) / "root"
            unpack_kernel(metapackage, release, unpacked, host_first=host_first)
            _prepare(unpacked)
            move_into_place(unpacked, root)
    return _from_tree(root)


def _prepare(root: Path) -> None:
    if not (root / "lib").exists():  # packages of merged-/usr releases
        (root / "lib").symlink_to("usr/lib")
    release = release_of(root)
    for packed in (root / "lib" / "modules" / release).rglob("*.ko.xz"):
        with lzma.open(packed) as source, packed.with_suffix("").open("wb") as target:
            shutil.copyfileobj(source, target)
        packed.unlink()
    depmod = shutil.which("depmod") or "/sbin/depmod"  # not every user's PATH has sbin
    run([depmod, "-b", str(root), release], timeout_s=120)


def move_into_place(source: Path, target: Path) -> None:
    """Have a folder of the cache appear at once, or find that another process was faster."""
    try:
        source.rename(target)
    except OSError:
        if not target.is_dir():  # another process may have been faster
            raise


def release_of(root: Path) -> str:
    """The release of the one kernel whose modules are in a tree; LabSetupError if that is not so."""
    releases = sorted(path.name for path in (root / "lib" / "modules").glob("*"))
    if len(releases) != 1:
        raise LabSetupError(f"{root}/lib/modules has {len(releases)} kernels, one is expected")
    return releases[0]


def _from_tree(root: Path) -> Kernel:
    release = release_of(root)
    for image in (root / "boot" / f"vmlinuz-{release}", root / "lib" / "modules" / release / "vmlinuz"):
        if image.is_file():
            return Kernel(release, image, root)
    raise LabSetupError(f"no kernel image for {release} below {root}; delete the folder to download it again")
