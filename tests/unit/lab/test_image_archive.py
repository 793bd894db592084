"""Image archives made by hand: the layout that `ctr images import` reads, and nothing of the host in them."""

import hashlib
import json
import tarfile

import pytest

from lab.cluster.image_archive import Image, write_archive


@pytest.fixture
def archive(tmp_path):
    program = tmp_path / "program"
    program.write_bytes(b"\x7fELF")
    image = Image("example.org/x:1", {"/bin/x": program}, {"/bin/y": "x"}, entrypoint=("/bin/x",))
    write_archive(image, tmp_path / "x.tar")
    return tmp_path / "x.tar"


def test_the_manifest_names_the_image_and_its_parts(archive):
    with tarfile.open(archive) as tar:
        (entry,) = json.load(tar.extractfile("manifest.json"))
        config = json.load(tar.extractfile(entry["Config"]))
        layer = tar.extractfile(entry["Layers"][0]).read()

    assert entry["RepoTags"] == ["example.org/x:1"]
    assert config["config"]["Entrypoint"] == ["/bin/x"]
    assert config["rootfs"]["diff_ids"] == [f"sha256:{hashlib.sha256(layer).hexdigest()}"]


def test_the_layer_has_files_links_and_the_folders_they_need(archive):
    with tarfile.open(archive) as tar:
        (entry,) = json.load(tar.extractfile("manifest.json"))
        with tarfile.open(fileobj=tar.extractfile(entry["Layers"][0])) as layer:
            assert set(layer.getnames()) == {"bin", "tmp", "bin/x", "bin/y"}
            assert layer.getmember("bin/y").linkname == "x"
            assert layer.getmember("bin/x").mode == 0o755


def test_the_same_content_makes_the_same_archive(archive, tmp_path):
    again = tmp_path / "again.tar"
    program = tmp_path / "other-name"
    program.write_bytes(b"\x7fELF")
    write_archive(
        Image("example.org/x:1", {"/bin/x": program}, {"/bin/y": "x"}, entrypoint=("/bin/x",)), again
    )

    assert again.read_bytes() == archive.read_bytes()
