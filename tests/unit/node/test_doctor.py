"""What the doctor says of pools and of vhost-user servers (csi_vduse/node/doctor.py)."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from csi_vduse.config import PoolConfig, parse_pool
from csi_vduse.node.doctor import Finding, examine
from tests.unit.vhost_user.test_vhost_user_relay import serving


def found(check: str, *pools: PoolConfig, servers: tuple[Path, ...] = ()) -> Finding:
    (finding,) = (each for each in examine(pools, servers) if each.check == check)
    return finding


def test_a_server_of_a_disk_is_asked(tmp_path: Path):
    image, path = tmp_path / "image", tmp_path / "disk.sock"
    image.write_bytes(bytes(4 << 20))
    with serving(path, image, "--queues", "2"):
        finding = found(f"vhost-user {path}", servers=(path,))
    assert (finding.verdict, finding.seen) == ("good", "4 MiB, 2 queues; direct")


def test_a_server_that_is_not_there(tmp_path: Path):
    finding = found(f"vhost-user {tmp_path}", servers=(tmp_path,))
    assert finding.verdict == "bad"
    assert finding.remedy


@pytest.mark.parametrize("kind", ["nbd", "qsd"])
def test_a_pool_of_a_storage_server_here(tmp_path: Path, kind: str):
    pool = parse_pool(f"p={kind}:unix:{tmp_path}/control.sock")
    assert found("pool p", pool).verdict == "bad"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{tmp_path}/control.sock")
        assert found("pool p", pool).verdict == "good"


def test_a_pool_elsewhere_is_not_asked():
    assert found("pool p", parse_pool("p=nbd:storage.example?tls=/keys")).verdict == "good"
