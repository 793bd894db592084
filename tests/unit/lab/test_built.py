"""Results in the cache: one build per content, and never half a result."""

import pytest

from lab.cluster.built import built, digest


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CSI_VDUSE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_the_same_content_is_built_once():
    builds = []
    first = built("thing", "k1", builds.append)
    second = built("thing", "k1", builds.append)

    assert first == second
    assert len(builds) == 1


def test_a_failed_build_leaves_nothing_behind(cache):
    def fail(target):
        (target / "half").touch()
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        built("thing", "k1", fail)

    assert list((cache / "built").iterdir()) == []


def test_newer_content_replaces_older():
    older = built("thing", "k1", lambda _: None)
    newer = built("thing", "k2", lambda _: None)

    assert newer.is_dir()
    assert not older.exists()


def test_a_result_is_not_mistaken_for_an_older_one_of_a_longer_name():
    other = built("thing-else", "k1", lambda _: None)
    built("thing", "k1", lambda _: None)

    assert other.is_dir()


def test_the_digest_sees_names_content_and_executable_bits(tmp_path):
    file = tmp_path / "a"
    file.write_text("x")
    first = digest(["w"], [file], tmp_path)
    file.chmod(0o755)
    second = digest(["w"], [file], tmp_path)
    file.write_text("y")
    third = digest(["w"], [file], tmp_path)

    assert len({first, second, third}) == 3
    assert digest(["ab", "c"]) != digest(["a", "bc"])
