"""A worker in service: what whoever takes it over could do, tried from inside of it, and what it is seen to be."""

from __future__ import annotations

import errno
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from csi_vduse.dataplane import jail
from csi_vduse.proto import agent_pb2
from tests.vm import test_nbd as nbd
from tests.vm import vhost_user_servers as vhost_user
from tests.vm.conftest import MIB, RunningAgent, kill, leaves_nothing, wait_until
from tests.vm.inside import Inside, inside
from tests.vm.nbd_servers import nbdkit, serving
from tests.vm.test_agent import attach, detach, inspect
from tests.vm.test_recovery import verified_writing, writes

KINDS = ("file", "nbd", "vhost-user")
REFUSED = (-errno.EPERM, -errno.EACCES)
AT_FDCWD = -100
# Their numbers on x86_64, as in unistd_64.h of the kernel.
CALLS = {
    "openat": 257, "open": 2, "openat2": 437, "creat": 85, "socket": 41, "socketpair": 53, "connect": 42, "bind": 49,
    "kill": 62, "tkill": 200, "tgkill": 234, "pidfd_open": 434, "pidfd_getfd": 438, "pidfd_send_signal": 424,
    "ptrace": 101, "process_vm_readv": 310, "execve": 59, "execveat": 322, "fork": 57, "vfork": 58, "clone": 56,
    "mount": 165, "umount2": 166, "pivot_root": 155, "chroot": 161, "setns": 308, "unshare": 272, "setuid": 105,
    "setresuid": 117, "capset": 126, "bpf": 321, "perf_event_open": 298, "init_module": 175, "reboot": 169, "keyctl": 250,
    "getpid": 39, "userfaultfd": 323,
    "open_by_handle_at": 304, "unlink": 87, "mkdir": 83, "mknod": 133, "chmod": 90, "link": 86,
    "symlink": 88, "truncate": 76, "name_to_handle_at": 303, "inotify_init1": 294, "prlimit64": 302, "shmget": 29,
}  # fmt: skip


def _worker(agent: RunningAgent) -> int:
    return int(inspect(agent).attachment.worker_pid)


def _status(pid: int) -> dict[str, str]:
    return dict(
        line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line
    )


@contextmanager
def _attached(agent: RunningAgent, image: Path, kind: str) -> Iterator[str]:
    """A volume whose bytes are in a file, or behind a server; gives its path and leaves nothing."""
    with leaves_nothing(agent), ExitStack() as servers:
        if kind == "nbd":
            server = servers.enter_context(serving(nbdkit(image)))
            yield nbd.attach(agent, agent_pb2.NbdBackend(uri=server.uri))
        elif kind == "vhost-user":
            socket_path = image.with_name("disk.sock")
            yield vhost_user.attach(
                agent, servers.enter_context(vhost_user.serving(vhost_user.ours(socket_path, image)))
            )
        else:
            yield attach(agent, image).path
        detach(agent)


@pytest.mark.parametrize("kind", KINDS)
def test_a_worker_in_service_is_nobody(shared: RunningAgent, image: Path, kind: str):
    with _attached(shared, image, kind):
        pid = _worker(shared)
        for task in Path(f"/proc/{pid}/task").iterdir():  # its queues' threads too
            status = _status(int(task.name))
            assert {int(number) >= jail.FIRST_USER for number in status["Uid"].split()} == {True}
            assert {int(number) >= jail.FIRST_USER for number in status["Gid"].split()} == {True}
            assert status["Groups"].split() == []
            for capabilities in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
                assert int(status[capabilities], 16) == 0, capabilities
            assert int(status["VmLck"].split()[0]) > 0  # and keeps its own memory
            assert (status["NoNewPrivs"], status["Seccomp"]) == ("1", "2")
        for namespace in ("mnt", "ipc", "uts", "net"):
            assert (
                Path(f"/proc/{pid}/ns/{namespace}").readlink()
                != Path(f"/proc/self/ns/{namespace}").readlink()
            )
        assert len(Path(f"/proc/{pid}/mountinfo").read_text().splitlines()) == 1
        assert list(Path(f"/proc/{pid}/root").iterdir()) == []


def test_two_workers_are_two_users(shared: RunningAgent, image: Path, tmp_path: Path):
    other = tmp_path / "other.raw"
    other.touch()
    os.truncate(other, 16 * MIB)
    with leaves_nothing(shared):
        attach(shared, image)
        attach(shared, other, volume_id="vol-other")
        users = {
            _status(pid)["Uid"]
            for pid in (_worker(shared), inspect(shared, "vol-other").attachment.worker_pid)
        }
        assert len(users) == 2
        detach(shared, "vol-other")
        detach(shared)


@pytest.mark.parametrize("kind", KINDS)
def test_whoever_takes_a_worker_over_gets_nothing_by_it(
    shared: RunningAgent, image: Path, tmp_path: Path, kind: str
):
    secret = tmp_path / "secret"
    secret.write_text("of somebody else")
    secret.chmod(0o666)
    with _attached(shared, image, kind) as path:
        pid = _worker(shared)
        with inside(pid) as worker:
            assert worker.call(CALLS["getpid"]) == pid  # it does what it is told, and may do what it needs
            _nothing_can_be_opened(
                worker,
                [str(secret), str(image), path, "/dev/vduse/control", "/etc/passwd", "/proc/1/mem", "/"],
            )
            _nobody_can_be_reached(worker)
            _nothing_else_is_possible(worker)
        subprocess.run(
            ["dd", f"if={path}", "of=/dev/null", "bs=64k", "count=4", "iflag=direct"], check=True, timeout=60
        )


def _nothing_can_be_opened(worker: Inside, paths: list[str]) -> None:
    for path in paths:
        name = path.encode() + b"\0"
        for flags in (os.O_RDONLY, os.O_RDWR, os.O_PATH):
            assert worker.call(CALLS["openat"], AT_FDCWD, name, flags, 0) in REFUSED, path
            assert worker.call(CALLS["open"], name, flags, 0) in REFUSED, path
        assert worker.call(CALLS["openat2"], AT_FDCWD, name, struct.pack("=QQQ", 0, 0, 0), 24) in REFUSED, (
            path
        )


def _nobody_can_be_reached(worker: Inside) -> None:
    for family in (
        socket.AF_UNIX,
        socket.AF_INET,
        socket.AF_INET6,
        socket.AF_NETLINK,
        socket.AF_PACKET,
        socket.AF_VSOCK,
    ):
        assert worker.call(CALLS["socket"], family, socket.SOCK_STREAM, 0) in REFUSED, family
    assert worker.call(CALLS["socketpair"], socket.AF_UNIX, socket.SOCK_STREAM, 0, bytes(8)) in REFUSED
    me = os.getpid()
    assert worker.call(CALLS["kill"], me, 0) in REFUSED
    assert worker.call(CALLS["kill"], 1, signal.SIGKILL) in REFUSED
    assert worker.call(CALLS["tgkill"], me, me, 0) in REFUSED
    assert worker.call(CALLS["pidfd_open"], me, 0) in REFUSED
    assert worker.call(CALLS["ptrace"], 16, me, 0, 0) in REFUSED
    assert worker.call(CALLS["process_vm_readv"], me, bytes(16), 1, bytes(16), 1, 0) in REFUSED


def _nothing_else_is_possible(worker: Inside) -> None:
    shell = b"/bin/sh\0"
    assert worker.call(CALLS["execve"], shell, 0, 0) in REFUSED
    assert worker.call(CALLS["execveat"], AT_FDCWD, shell, 0, 0, 0) in REFUSED
    assert worker.call(CALLS["clone"], signal.SIGCHLD, 0, 0, 0, 0) in REFUSED
    tried_above = {
        "getpid",
        "openat",
        "open",
        "openat2",
        "socket",
        "socketpair",
        "kill",
        "tgkill",
        "pidfd_open",
        "ptrace",
    }
    for name in CALLS.keys() - tried_above - {"execve", "execveat", "clone", "process_vm_readv"}:
        assert worker.call(CALLS[name], 0, 0, 0, 0, 0, 0) in REFUSED, name
    # Code of its own would need a page that is both, and terminals take what is typed by ioctl (TIOCSTI).
    writable_code = worker.call(9, 0, 4096, 7, 0x22, -1 & (1 << 64) - 1, 0)
    assert writable_code in REFUSED
    assert worker.call(16, 2, 0x5412, b"x") in REFUSED


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
def test_a_jailed_worker_is_replaced_by_another(shared: RunningAgent, image: Path, *, packed: bool):
    with leaves_nothing(shared):
        path = attach(shared, image, packed=packed).path
        first = _worker(shared)
        kill(first)
        wait_until(lambda: _worker(shared) not in (0, first), "another worker")
        subprocess.run(
            ["dd", "if=/dev/zero", f"of={path}", "bs=64k", "count=4", "oflag=direct"], check=True, timeout=60
        )
        assert _status(_worker(shared))["Seccomp"] == "2"
        detach(shared)


def _broker(worker: int) -> int:
    (child,) = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
    return int(child)


def test_who_connects_for_a_worker_has_no_power_and_is_replaced_with_it(shared: RunningAgent, image: Path):
    with _attached(shared, image, "nbd") as path:
        first = _worker(shared)
        broker = _broker(first)
        status = _status(broker)
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1")
        held = [str(link.readlink()) for link in Path(f"/proc/{broker}/fd").iterdir()]
        assert not [file for file in held if "vduse" in file or str(image) in file]
        with verified_writing(path, "--ioengine=libaio", "--iodepth=8"):
            kill(broker)
            wait_until(lambda: _worker(shared) not in (0, first), "another worker")
            wait_until(lambda: writes(shared) > 50, "writing")
        second = _broker(_worker(shared))
        kill(_worker(shared))
        wait_until(lambda: not Path(f"/proc/{second}").exists(), "end of the broker")
        wait_until(lambda: inspect(shared).attachment.state == agent_pb2.STATE_ATTACHED, "service")


def test_the_agent_has_the_powers_that_it_needs_and_no_others(shared: RunningAgent):
    for pid in (shared.process.pid, shared.child_pid()):
        kept = sum(1 << capability for capability in jail.OF_AGENT)
        status = _status(pid)
        assert {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {kept}
