"""Option texts become values, or errors that name what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from csi_vduse import records
from csi_vduse.config import PoolConfig, parse_endpoint, parse_pools, parse_size
from csi_vduse.errors import DataLoss, InvalidArgument


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [
        ("0", 0),
        ("512", 512),
        ("4k", 4096),
        ("1G", 1 << 30),
        ("2GiB", 2 << 30),
        ("1GB", 10**9),
        ("3 mib", 3 << 20),
    ],
)
def test_sizes(text: str, size_bytes: int):
    assert parse_size(text) == size_bytes


@pytest.mark.parametrize("text", ["", "G", "-1", "1.5G", "1X", "1 G B", "0x10"])
def test_what_is_no_size_is_refused(text: str):
    with pytest.raises(InvalidArgument, match="not a size"):
        parse_size(text)


@pytest.mark.parametrize("text", ["unix:///run/csi.sock", "unix:/run/csi.sock"])
def test_endpoints(text: str):
    assert parse_endpoint(text) == Path("/run/csi.sock")


@pytest.mark.parametrize("text", ["", "/run/csi.sock", "tcp://127.0.0.1:1", "unix://run/csi.sock", "unix:"])
def test_what_is_no_endpoint_is_refused(text: str):
    with pytest.raises(InvalidArgument, match="unix:///PATH"):
        parse_endpoint(text)


def test_an_endpoint_too_long_for_a_socket_is_refused():
    with pytest.raises(InvalidArgument, match="107"):
        parse_endpoint("unix:///" + "x" * 107)


def test_pools_keep_their_order_and_everything_after_the_first_colon():
    assert parse_pools(["b=file:/x:y", "a=file:/z"]) == (
        PoolConfig("b", "file", "/x:y"),
        PoolConfig("a", "file", "/z"),
    )


@pytest.mark.parametrize(
    ("texts", "named"),
    [
        ([], "no pool"),
        (["a"], "NAME=KIND:LOCATION"),
        (["a=file:"], "NAME=KIND:LOCATION"),
        (["A!=file:/x"], "A!"),
        (["a=tape:/x"], "tape"),
        (["a=file:relative"], "relative"),
        (["a=file:/x", "a=file:/y"], "twice"),
    ],
)
def test_impossible_pools_are_refused_by_name(texts: list[str], named: str):
    with pytest.raises(InvalidArgument, match=named):
        parse_pools(texts)


def test_a_record_is_read_as_it_was_written(tmp_path: Path):
    path = tmp_path / "deep/er/record.json"
    records.write_record(path, {"a": 1})
    assert records.read_record(path) == {"version": 1, "a": 1}
    assert [entry.name for entry in path.parent.iterdir()] == ["record.json"]
    records.delete_record(path)
    records.delete_record(path)
    assert records.read_record(path) is None


def test_a_write_that_fails_leaves_the_old_record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "record.json"
    records.write_record(path, {"a": 1})

    def full(_fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        records.write_record(path, {"a": 2})
    assert json.loads(path.read_text())["a"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["record.json"]


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"version": 2}'])
def test_a_record_that_is_damaged_or_newer_is_an_error_not_nothing(tmp_path: Path, text: str):
    path = tmp_path / "record.json"
    path.write_text(text)
    with pytest.raises(DataLoss, match=r"record\.json"):
        records.read_record(path)


def test_listing_skips_what_a_crash_left_half_written(tmp_path: Path):
    records.write_record(tmp_path / "b.json", {})
    records.write_record(tmp_path / "a.json", {})
    (tmp_path / ".c.json.1.tmp").write_text("{")
    assert [path.name for path in records.list_records(tmp_path)] == ["a.json", "b.json"]
