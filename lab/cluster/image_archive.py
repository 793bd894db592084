"""Container images by hand: a few files in one layer, as an archive that `ctr images import` takes.

What is kept true: the archive depends on the image's content alone (times and owners are zero), so the same files
give the same image everywhere. Format: the one of `docker save`, manifest.json beside config and layer
(https://github.com/moby/docker-image-spec, v1.2).
"""

import hashlib
import io
import json
import tarfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class Image:
    """One image.

    files: host file by path in the image; links: target by path; entrypoint, command: as in a Dockerfile.
    """

    name: str
    files: Mapping[str, Path]
    links: Mapping[str, str] = field(default_factory=dict)
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()


def write_archive(image: Image, target: Path) -> None:
    """Write the image's archive."""
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as archive:
        layer_file = target.with_suffix(".layer")
        try:
            _write_layer(image, layer_file)
            with layer_file.open("rb") as layer:
                layer_digest = hashlib.file_digest(layer, "sha256").hexdigest()
            config = json.dumps(_config(image, layer_digest), sort_keys=True).encode()
            config_name = f"{hashlib.sha256(config).hexdigest()}.json"
            manifest = [
                {"Config": config_name, "RepoTags": [image.name], "Layers": [f"{layer_digest}/layer.tar"]}
            ]
            _add(archive, f"{layer_digest}/layer.tar", layer_file)
            _add(archive, config_name, config)
            _add(archive, "manifest.json", json.dumps(manifest).encode())
        finally:
            layer_file.unlink(missing_ok=True)


def _config(image: Image, layer_digest: str) -> dict[str, object]:
    settings: dict[str, object] = {"Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"]}
    if image.entrypoint:
        settings["Entrypoint"] = list(image.entrypoint)
    if image.command:
        settings["Cmd"] = list(image.command)
    return {
        "architecture": "amd64",
        "os": "linux",
        "created": "1970-01-01T00:00:00Z",
        "config": settings,
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{layer_digest}"]},
    }


def _write_layer(image: Image, target: Path) -> None:
    with tarfile.open(target, "w", format=tarfile.GNU_FORMAT) as layer:
        folders = {"/tmp"}  # noqa: S108 -- in the image
        for path in (*image.files, *image.links):
            folders.update(str(parent) for parent in PurePosixPath(path).parents if str(parent) != "/")
        for folder in sorted(folders):
            entry = tarfile.TarInfo(folder.lstrip("/"))
            entry.type = tarfile.DIRTYPE
            entry.mode = 0o1777 if folder == "/tmp" else 0o755  # noqa: S108
            layer.addfile(entry)
        for path, source in sorted(image.files.items()):
            _add(layer, path.lstrip("/"), source)
        for path, link in sorted(image.links.items()):
            entry = tarfile.TarInfo(path.lstrip("/"))
            entry.type = tarfile.SYMTYPE
            entry.linkname = link
            layer.addfile(entry)


def _add(archive: tarfile.TarFile, name: str, content: Path | bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.mode = 0o755
    if isinstance(content, bytes):
        entry.size = len(content)
        archive.addfile(entry, io.BytesIO(content))
        return
    with content.open("rb") as file:
        entry.size = content.stat().st_size
        archive.addfile(entry, file)
