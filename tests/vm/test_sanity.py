"""csi-sanity against `csi-vduse standalone` on a kernel with VDUSE: the whole driver, nothing doubled."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from csi_vduse.proto import csi_pb2, csi_pb2_grpc
from tests.sanity import csi_sanity

MODULES = ("vduse", "virtio-vdpa", "vhost-vdpa")
# The guest is emulated: Python starts in tens of seconds there.
START_TIMEOUT_S = 300
STOP_TIMEOUT_S = 120
SANITY_TIMEOUT_S = 2400


@contextlib.contextmanager
def standalone(
    directory: Path, *pools: Path, default: str = "", node_id: str = "vm", options: tuple[str, ...] = ()
) -> Iterator[Path]:
    """Run `csi-vduse standalone` with everything below `directory`; gives its socket once it is ready.

    pools: directories of further pools beside "default"; their names are the directories'.
    default: what and where the default pool is; empty: a directory, `directory`/pool.
    """
    subprocess.run(["modprobe", "--all", *MODULES], check=True, timeout=60)
    if not default:
        (directory / "pool").mkdir()
        default = f"file:{directory}/pool"
    endpoint = directory / "csi.sock"
    log = directory / "standalone.log"
    argv = ["csi-vduse", "standalone", "--endpoint", f"unix://{endpoint}", "--node-id", node_id]
    argv += ["--state-dir", str(directory / "state"), "--run-dir", str(directory / "run")]
    argv += ["--pool", f"default={default}", *options]
    argv += [f"--pool={pool.name}=file:{pool}" for pool in pools]
    with log.open("wb") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_ready(process, endpoint, log)
        yield endpoint
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            sys.stdout.write(log.read_text()[-20000:])  # shown if the test fails


@contextlib.contextmanager
def storage_server(directory: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run `csi-vduse storage-server` over `directory`/pool; its sockets are control.sock and nbd.sock there."""
    (directory / "pool").mkdir(exist_ok=True)
    argv = ["csi-vduse", "storage-server", "--directory", str(directory / "pool")]
    argv += ["--run-dir", str(directory / "run"), "--no-tls", "--nbd", f"unix:{directory}/nbd.sock"]
    argv += ["--control", f"unix:{directory}/control.sock", *options]
    log = directory / "storage.log"
    with log.open("ab") as output:
        process = subprocess.Popen(argv, stdout=output, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not (directory / "control.sock").exists():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        finally:
            process.kill()
            sys.stdout.write(log.read_text()[-20000:])


def _wait_until_ready(process: subprocess.Popen[bytes], endpoint: Path, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    with grpc.insecure_channel(f"unix:{endpoint}") as channel:
        while time.monotonic() < deadline:
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(grpc.RpcError):
                answer = csi_pb2_grpc.IdentityStub(channel).Probe(
                    csi_pb2.ProbeRequest(), wait_for_ready=True, timeout=10
                )
                if answer.ready.value:
                    return
    pytest.fail(f"not ready within {START_TIMEOUT_S} s: {log.read_text()}")


@pytest.mark.parametrize("access_type", ["mount", "block"])
def test_csi_sanity_passes_on_vduse_devices(tmp_path: Path, access_type: str) -> None:
    csi_sanity.build()
    with standalone(tmp_path) as endpoint:
        done = subprocess.run(
            csi_sanity.command(endpoint, tmp_path, access_type),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SANITY_TIMEOUT_S,
            check=False,
        )
        csi_sanity.read_report(tmp_path, done.stdout).require_success()
        assert not list((tmp_path / "pool").glob("*/*")), "csi-sanity's volumes are still in the pool"
        assert sorted(Path("/dev/vduse").iterdir()) == [Path("/dev/vduse/control")]
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


@pytest.mark.parametrize(
    ("access_type", "kind", "options"),
    [
        ("mount", "nbd", ["--format", "raw"]),
        ("block", "nbd", ["--format", "qcow2"]),
        ("mount", "qsd", ["--vhost-user", "d"]),
    ],
    ids=["mount-raw", "block-qcow2", "mount-qsd"],
)
def test_csi_sanity_passes_with_a_storage_server(
    tmp_path_factory: pytest.TempPathFactory, access_type: str, kind: str, options: list[str]
) -> None:
    csi_sanity.build()
    # Short names: a worker's socket below them has to fit.
    server, driver = tmp_path_factory.mktemp("server"), tmp_path_factory.mktemp("driver")
    pool = f"{kind}:unix:{server}/control.sock"
    options = [str(server / each) if each == "d" else each for each in options]
    with storage_server(server, *options), standalone(driver, default=pool) as endpoint:
        done = subprocess.run(
            csi_sanity.command(endpoint, driver, access_type),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=SANITY_TIMEOUT_S,
            check=False,
        )
        csi_sanity.read_report(driver, done.stdout).require_success(publishes=kind == "nbd")
        assert not list((server / "pool").glob("*/*")), "csi-sanity's volumes are still on the server"
        assert sorted(Path("/dev/vduse").iterdir()) == [Path("/dev/vduse/control")]
