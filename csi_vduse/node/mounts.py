"""The mount table, and the only places that change it.

Truth is /proc/self/mountinfo: nothing here remembers a mount. After every change the table is read again, so
"mounted" and "unmounted" are observations and not exit codes. Looking something up in the table never touches
the file system below a mount point, so a dead device cannot hang a look-up.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from csi_vduse.agent.bounded import bounded
from csi_vduse.errors import CommandFailed, DeadlineExceeded, FailedPrecondition, VduseError
from csi_vduse.run import run
from csi_vduse.vdpa.disk_users import loops_over

MOUNTINFO = Path("/proc/self/mountinfo")
MOUNT_TIMEOUT_S = 60.0
UNMOUNT_TIMEOUT_S = 60.0
LOOPS_TIMEOUT_S = 5.0
SYS, DEV = Path("/sys"), Path("/dev")
# What /dev is.
_DEVICE_NODES = frozenset({"devtmpfs", "tmpfs"})
_STACK_LIMIT = 16
_DELETED = "//deleted"
# ext4 shows the last two once it has met an error (since Linux 6.15) or was shut down.
_WRITE_PROTECTED = frozenset({"ro", "emergency_ro", "shutdown"})
_OCTAL = re.compile(rb"\\([0-7]{3})")


@dataclass(frozen=True, order=True)
class DeviceNumber:
    """Major and minor number of a device."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}:{self.minor}"


@dataclass(frozen=True)
class Mount:
    """One line of mountinfo (proc_pid_mountinfo(5)), octal escapes decoded.

    Args:
        device: st_dev of files on the mount; anonymous (major 0) for btrfs and pseudo file systems.
        root: which directory or file of the file system appears at the mount point.
        options: of this mount point; ``ro`` here is a read-only view of a writable file system.
        super_options: of the file system itself.
    """

    mount_id: int
    parent_id: int
    device: DeviceNumber
    root: str
    mount_point: str
    options: frozenset[str]
    fs_type: str
    source: str
    super_options: frozenset[str]

    @property
    def read_only(self) -> bool:
        """Whether writes through this mount point are refused."""
        return "ro" in self.options or self.is_write_protected

    @property
    def is_write_protected(self) -> bool:
        """Whether the file system refuses writes at every mount point: staged so, or after an I/O error."""
        return not self.super_options.isdisjoint(_WRITE_PROTECTED)


@dataclass(frozen=True)
class NodeFile:
    """A device node as the mount table sees it: which file system it lies on, and where in it."""

    file_system: DeviceNumber
    root: str


def parse_mountinfo(text: str) -> tuple[Mount, ...]:
    """Parse the content of mountinfo; pure.

    Raises:
        VduseError: a line does not have the documented form.
    """
    # Only "\n" ends a line: other control characters may be part of a path.
    return tuple(_parse_line(line) for line in text.split("\n") if line)


def _parse_line(line: str) -> Mount:
    # 36 35 98:0 /mnt1 /mnt2 rw,noatime master:1 - ext3 /dev/root rw,errors=continue
    fields = line.split(" ")
    try:
        separator = fields.index("-", 6)
        fs_type, source, super_options = fields[separator + 1 : separator + 4]
        major, minor = fields[2].split(":")
        return Mount(
            mount_id=int(fields[0]),
            parent_id=int(fields[1]),
            device=DeviceNumber(int(major), int(minor)),
            root=unescape(fields[3]),
            mount_point=unescape(fields[4]),
            options=frozenset(fields[5].split(",")),
            fs_type=unescape(fs_type),
            source=unescape(source),
            super_options=frozenset(super_options.split(",")),
        )
    except (ValueError, IndexError) as error:
        raise VduseError(f"cannot read the mount table: line {line!r} has an unknown form") from error


def unescape(field: str) -> str:
    r"""Decode the octal escapes (``\040`` for a space) that the kernel's seq_path writes."""
    raw = os.fsencode(field)
    return os.fsdecode(_OCTAL.sub(lambda match: bytes([int(match[1], 8) & 0xFF]), raw))


def read_mounts() -> tuple[Mount, ...]:
    """Return the mount table of this process."""
    return parse_mountinfo(os.fsdecode(MOUNTINFO.read_bytes()))


def top_mount(mounts: Iterable[Mount], path: str) -> Mount | None:
    """Return the mount seen at ``path``: the last of those stacked there; None if it is no mount point."""
    found = [mount for mount in mounts if mount.mount_point == path]
    return found[-1] if found else None


def device_mounts(mounts: Iterable[Mount], number: DeviceNumber, path: str) -> tuple[Mount, ...]:
    """Return the mounts of the file system on a block device.

    ext4 and xfs carry the device's number; btrfs carries an anonymous one, and is known by its source. A
    disk's number and name are not given away while a mount holds the disk, so neither can mean another
    volume.

    Args:
        mounts: the table.
        number: of the block device.
        path: of the block device, such as /dev/vdb.
    """
    return tuple(
        mount
        for mount in mounts
        if mount.device == number
        or (mount.fs_type == "btrfs" and mount.device.major == 0 and mount.source == path)
    )


def node_file(mounts: Sequence[Mount], path: str) -> NodeFile:
    """Say where in which file system a device node lies, so that bind mounts of it can be recognised.

    Args:
        mounts: the table.
        path: absolute and without symbolic links.
    """
    best = max(
        (mount for mount in mounts if _is_below(path, mount.mount_point)),
        key=lambda mount: (len(mount.mount_point), mounts.index(mount)),
    )
    below = path[len(best.mount_point.rstrip("/")) :]
    return NodeFile(best.device, (best.root.rstrip("/") + below) or "/")


def node_file_mounts(mounts: Iterable[Mount], node: NodeFile) -> tuple[Mount, ...]:
    """Return the bind mounts of a device node. A node deleted since is another one, and does not match."""
    return tuple(mount for mount in mounts if mount.device == node.file_system and mount.root == node.root)


def is_deleted_node(mount: Mount) -> bool:
    """Whether the file that is bind-mounted here has been deleted since, as a removed disk's node is."""
    return mount.root.endswith(_DELETED)


def _is_below(path: str, mount_point: str) -> bool:
    return mount_point in {"/", path} or path.startswith(mount_point + "/")


async def mount_device(device: str, target: str, *, fs_type: str, options: Sequence[str]) -> None:
    """Mount a block device on a directory, and see that it is there (mount(8)).

    Raises:
        CommandFailed: mount(8) refused; carries its output.
        DeadlineExceeded: it did not end; the device does not answer.
        FailedPrecondition: it reported success but the table does not show the mount.
    """
    argv = ["mount", "--no-canonicalize", "--types", fs_type]
    together = ",".join(options)  # a user's are among them, and may hold what is nobody else's to know
    if options:
        argv += ["--options", together]
    await run([*argv, device, target], timeout_s=MOUNT_TIMEOUT_S, secret=[together])
    _expect_mounted(target)


async def bind(source: str, target: str, *, read_only: bool) -> None:
    """Bind ``source`` to ``target``; the two must be of one kind, file or directory.

    A read-only bind needs a second step, the remount: the kernel ignores ``ro`` on the bind itself
    (mount(2)). If that fails the bind is taken away again, so that nothing writable is left.

    Raises:
        CommandFailed, DeadlineExceeded, FailedPrecondition: as for mount_device.
    """
    await run(["mount", "--no-canonicalize", "--bind", source, target], timeout_s=MOUNT_TIMEOUT_S)
    _expect_mounted(target)
    if not read_only:
        return
    try:
        await run(
            ["mount", "--no-canonicalize", "--options", "remount,bind,ro", target], timeout_s=MOUNT_TIMEOUT_S
        )
        _expect_read_only(target)
    except BaseException:
        await unmount(target)
        raise


async def unmount(path: str) -> None:
    """Take every mount off ``path``, and see that none is left. OK if there is none.

    Never lazy and never forced: a mount in use is an error, because data may still be on its way.

    Raises:
        FailedPrecondition: the mount is in use.
        DeadlineExceeded: writing the last data back did not end; the device does not answer.
    """
    for _ in range(_STACK_LIMIT):
        if top_mount(read_mounts(), path) is None:
            return
        try:
            await run(["umount", "--no-canonicalize", path], timeout_s=UNMOUNT_TIMEOUT_S)
        except CommandFailed as error:
            if top_mount(read_mounts(), path) is None:
                return
            raise await _in_use(path, error) from error
    raise FailedPrecondition(f"more than {_STACK_LIMIT} mounts lie on {path}", hint="unmount them by hand")


async def _in_use(path: str, error: CommandFailed) -> FailedPrecondition:
    """Return the error for a mount that cannot be taken off; names the loop devices, which no process shows."""
    loops: list[str] = []
    with contextlib.suppress(DeadlineExceeded, OSError):
        loops = await bounded(
            f"looking for loop devices over {path}",
            partial(_loops_over, path),
            timeout_s=LOOPS_TIMEOUT_S,
            undo=lambda _: None,
        )
    text = f"cannot unmount {path}: {error.output.strip()}"
    if loops:
        return FailedPrecondition(
            f"{text}; used by {', '.join(loops)}", hint="detach these loop devices (losetup -d), then retry"
        )
    return FailedPrecondition(text, hint="end the processes that use it (fuser -vm), then retry")


def _loops_over(path: str) -> list[str]:
    mount = top_mount(read_mounts(), path)
    # Of a bound device node; the root of a file system may be on a device that does not answer.
    is_node = mount is not None and mount.fs_type in _DEVICE_NODES
    numbers = [os.stat(path).st_rdev] if is_node else []  # noqa: PTH116 - in a thread
    return loops_over(SYS, DEV, path=path, numbers=numbers)


def _expect_mounted(target: str) -> Mount:
    mount = top_mount(read_mounts(), target)
    if mount is None:
        raise FailedPrecondition(f"mount reported success but nothing is mounted at {target}")
    return mount


def _expect_read_only(target: str) -> None:
    if not _expect_mounted(target).read_only:
        raise FailedPrecondition(f"the kernel kept the bind mount {target} writable")
