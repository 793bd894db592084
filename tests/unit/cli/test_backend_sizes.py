"""Backends whose size is no whole number of blocks are served without their end, and the log says how much that is."""

from __future__ import annotations

import argparse
import struct
from pathlib import Path

import pytest
import structlog

from csi_vduse.cli.options import add_device_options, attach_spec
from csi_vduse.errors import InvalidArgument
from tests.unit.fakes.nbd import ACK, FLAGS, GO, INFO, answering, export, reply, served, sizes

GIB = 1 << 30
ODD_BYTES = 1_000_001


def capacity_bytes(backend: str, *options: str) -> int:
    parser = argparse.ArgumentParser()
    add_device_options(parser)
    return attach_spec("vol", parser.parse_args(["--backend", backend, *options])).capacity_bytes


def left_out(logs: list[dict[str, object]]) -> list[object]:
    return [entry["left_out_bytes"] for entry in logs if "left_out_bytes" in entry]


def image(folder: Path, size_bytes: int) -> str:
    path = folder / "image"
    with path.open("wb") as file:
        file.truncate(size_bytes)
    return f"file:{path}"


@pytest.mark.parametrize(
    ("size_bytes", "options", "usable_bytes"),
    [
        (ODD_BYTES, (), ODD_BYTES // 512 * 512),
        (10 * GIB + 512, ("--block-size", "4096"), 10 * GIB),
        (10 * GIB + 512, (), 10 * GIB + 512),
    ],
)
def test_the_end_that_is_no_whole_block_is_left_out_and_told(
    tmp_path: Path, size_bytes: int, options: tuple[str, ...], usable_bytes: int
):
    expected = [size_bytes - usable_bytes] if size_bytes != usable_bytes else []
    with structlog.testing.capture_logs() as logs:
        assert capacity_bytes(image(tmp_path, size_bytes), *options) == usable_bytes
    assert left_out(logs) == expected
    go = export(size_bytes) + reply(GO, ACK)
    with structlog.testing.capture_logs() as logs, served(tmp_path, answering({GO: go})) as backend:
        assert capacity_bytes(backend.uri, *options) == usable_bytes
    assert left_out(logs) == expected


def test_what_the_servers_own_blocks_leave_out_is_told_too(tmp_path: Path):
    go = sizes(4096, 4096, 1 << 20) + export(10 * GIB + 512) + reply(GO, ACK)
    with structlog.testing.capture_logs() as logs, served(tmp_path, answering({GO: go})) as backend:
        assert capacity_bytes(backend.uri) == 10 * GIB
    assert left_out(logs) == [512]


def test_a_backend_of_less_than_a_block_is_refused_with_its_size(tmp_path: Path):
    with pytest.raises(InvalidArgument, match="2048 bytes"):
        capacity_bytes(image(tmp_path, 2048), "--block-size", "4096")


@pytest.mark.parametrize("scheme", ["nbd+unix", "NBD+UNIX"])
def test_a_scheme_is_one_whatever_its_letters_case(tmp_path: Path, scheme: str):
    go = reply(GO, INFO, struct.pack(">HQH", 0, GIB, FLAGS)) + reply(GO, ACK)
    with served(tmp_path, answering({GO: go})) as backend:
        assert capacity_bytes(backend.uri.replace("nbd+unix", scheme)) == GIB
