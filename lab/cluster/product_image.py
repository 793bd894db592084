"""Builds the product's Dockerfile with buildah: no daemon, no container engine, no registry.

The base image comes from debootstrap, under the name that the Dockerfile uses. What is kept true: the image that the
cluster runs is what the Dockerfile says, nothing added; buildah's storage is the cache's own; the result is rebuilt
when the Dockerfile or anything that it may copy changes.
"""

import re
import shutil
import tempfile
from pathlib import Path

from lab.archive import Release, mirror
from lab.cluster.built import built, digest
from lab.errors import LabSetupError
from lab.host import run
from lab.paths import CHECKOUT, cache_dir

BASE = "docker.io/library/debian:trixie-slim"
NAME = "docker.io/csivduse/csi-vduse"
_CERTIFICATES = "/etc/ssl/certs/ca-certificates.crt"
_DEBIAN = Release("trixie", security=True)
_BOOTSTRAP_S = 900.0
_BUILD_S = 1500.0
# What Debian's slim images leave out.
_SLIM = "".join(
    f"path-exclude /usr/share/{folder}/*\n" for folder in ("doc", "man", "locale", "info", "lintian")
)


def obtain(version: str) -> Path:
    """The folder with `image.tar`: the product's image, tagged with `version`, which is also what it says it is.

    Raises LabSetupError when the Dockerfile does not build.
    """
    files = context_files()
    key = digest([BASE, version], files, CHECKOUT)
    return built(f"image-{version}", key, lambda target: _build(target / "image.tar", version))


def context_files() -> list[Path]:
    """What a change of which changes the image: the files that git knows, without tests, docs and laboratory."""
    outside = ("tests/", "docs/", "lab/", "bench/", "deploy/", "tools/", ".ci/")
    listed = run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], timeout_s=60, cwd=CHECKOUT
    ).splitlines()
    inside = [name for name in listed if not name.startswith(outside)]
    paths = [CHECKOUT / name for name in inside if name == "README.md" or not name.endswith(".md")]
    return [path for path in paths if path.is_file()]


def copy_context(target: Path, version: str) -> None:
    """Copy what the image is built from into the folder `target`, as the release `version`."""
    for file in context_files():
        copy = target / file.relative_to(CHECKOUT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(file, copy)
    for name, key in (("pyproject.toml", "version"), ("csi_vduse/__init__.py", "__version__")):
        text, count = re.subn(
            rf'^{key} = ".*"$', f'{key} = "{version}"', (target / name).read_text(), flags=re.MULTILINE
        )
        if count != 1:
            raise LabSetupError(f"{name} has {count} lines `{key} = ...`; one was expected")
        (target / name).write_text(text)


def _build(target: Path, version: str) -> None:
    _obtain_base()
    tag = f"{NAME}:{version}"
    with tempfile.TemporaryDirectory(prefix=".build-", dir=cache_dir()) as work:
        context = Path(work) / "context"
        copy_context(context, version)
        pip = Path(work) / "pip.conf"
        pip.write_text("[global]\ncert = /run/host-certificates.crt\n")
        _buildah(
            *("build", "--isolation=chroot", "--pull-never", "--layers", "--format=docker"),
            # The host may reach PyPI through a proxy that its own certificates, and no others, vouch for.
            f"--volume={_CERTIFICATES}:/run/host-certificates.crt:ro",
            f"--volume={pip}:/etc/pip.conf:ro",
            *(f"--build-arg=VERSION={version}", "--tag", tag, str(context)),
        )
    _buildah("push", tag, f"docker-archive:{target}:{tag}")


def _obtain_base() -> None:
    """Make the base image in buildah's storage, unless it is there."""
    if BASE in _buildah("images", "--format={{.Name}}:{{.Tag}}").split():
        return
    with tempfile.TemporaryDirectory(prefix=".base-", dir=cache_dir()) as work:
        root = Path(work) / "root"
        run(
            ["debootstrap", "--variant=minbase", _DEBIAN.name, str(root), f"{mirror()}/debian"],
            timeout_s=_BOOTSTRAP_S,
        )
        (root / "etc/apt/sources.list").write_text(_DEBIAN.sources())
        (root / "etc/dpkg/dpkg.cfg.d/slim").write_text(_SLIM)
        for folder in ("usr/share/doc", "usr/share/man", "usr/share/locale", "var/lib/apt/lists"):
            shutil.rmtree(root / folder, ignore_errors=True)
        for package in (root / "var/cache/apt").rglob("*.*"):
            package.unlink()
        container = _buildah("from", "scratch").strip()
        _buildah("add", "--quiet", container, str(root), "/")
        _buildah("config", "--cmd=bash", container)
        _buildah("commit", "--quiet", "--rm", "--format=docker", container, BASE)


def _buildah(*words: str) -> str:
    if not shutil.which("buildah"):
        raise LabSetupError("buildah is missing; lab/install-cluster-deps.sh installs it")
    storage = cache_dir() / "buildah"
    options = [f"--root={storage}", f"--runroot={storage}-run", "--storage-driver=overlay"]
    return run(["buildah", *options, *words], timeout_s=_BUILD_S, cwd=CHECKOUT)
