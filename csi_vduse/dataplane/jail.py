"""What a worker gives up as soon as it has its descriptors: everything.

A guest writes into a worker's rings and a server answers it; whoever finds a hole there is then nobody, in an empty room:
a user and group of its own, no capabilities, no way to get any, no files, no network, and no system calls but those by
which it serves. What was opened before stays open: the image, the device, the log, the agent's connections. Sockets to
a server come from the broker (broker.py).

Kept true:
- It is entered with a single thread: namespaces, users and filters belong to threads, and later ones inherit them.
- User, capabilities and filter are never missing: without them the worker does not serve. Another layer that the kernel
  does not have, or does not give us, is named in what `enter` returns, and told by the worker.

Sources: seccomp(2), landlock(7), unshare(2), pivot_root(2), capabilities(7).
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import struct
from collections.abc import Callable, Collection
from typing import Final

import pyseccomp

from csi_vduse.dataplane._system import ffi, lib
from csi_vduse.errors import PermissionDenied

# Users nobody else has: systemd leaves this range unused (UIDS-GIDS.md), and it lies above what container runtimes map.
FIRST_USER: Final = 2_000_000_000
_MAX_FILES: Final = 4096  # the driver's memory of a VM may be in hundreds
_CAPABILITY_VERSION: Final = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_CAPABILITIES: Final = range(64)  # those that this kernel does not know are refused, one by one

# What the agent needs: for the bus (netlink in the host's namespace), for workers' jails and limits, to end workers (who
# are not its user), to see who has a disk, and for pools that are not root's.
OF_AGENT: Final = (
    lib.CAP_SYS_ADMIN,
    lib.CAP_NET_ADMIN,
    lib.CAP_SETUID,
    lib.CAP_SETGID,
    lib.CAP_SETPCAP,
    lib.CAP_SYS_RESOURCE,
    lib.CAP_IPC_LOCK,
    lib.CAP_KILL,
    lib.CAP_SYS_PTRACE,
    lib.CAP_DAC_OVERRIDE,
    lib.CAP_DAC_READ_SEARCH,
)

# Landlock's rights by the version of its ABI (linux/landlock.h of 6.12; the build's headers may be older).
_FILE_RIGHTS: Final = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}
_ALL_TCP: Final = 0b11  # bind, connect; from version 4 on
_ALL_SCOPES: Final = 0b11  # abstract unix sockets, signals; from version 6 on

# By which it reads, writes, waits and answers; memory; threads; itself. On x86_64 and aarch64.
_CALLS: Final = """
    read write readv writev pread64 pwrite64 preadv pwritev preadv2 pwritev2
    close fstat newfstatat statx fstatfs lseek fcntl dup eventfd2 memfd_create ftruncate
    poll ppoll epoll_create1 epoll_ctl epoll_wait epoll_pwait select pselect6
    recvmsg sendmsg recvfrom sendto accept4 shutdown getsockopt setsockopt getsockname
    io_uring_setup io_uring_enter io_uring_register
    munmap mremap madvise brk mlock mlock2 munlock
    futex set_robust_list rseq sched_yield sched_getaffinity membarrier gettid getpid
    rt_sigaction rt_sigprocmask rt_sigreturn sigaltstack restart_syscall
    clock_gettime clock_getres clock_nanosleep nanosleep gettimeofday time getcpu getrandom
    exit exit_group getuid geteuid getgid getegid getrusage uname sysinfo
"""
# ioctls, by the bits of their number that count: VDUSE's own (type 0x81), the size of a block device, blocking or not.
_IOCTLS: Final = ((0xFF00, 0x8100), (0xFFFFFFFF, 0x80081272), (0xFFFFFFFF, 0x5421))


def enter(user: int) -> tuple[str, ...]:
    """Give everything up, for good; return the names of the layers that this kernel or container does not have.

    user: the number of the user and the group to become.

    Raises:
        PermissionDenied: a layer that must be there could not be put up.
    """
    missing = [name for name, layer in _LAYERS if not _succeeds(layer)]
    try:
        _become(user)
        _call("no_new_privs", lib.prctl(lib.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
        if not _succeeds(_no_files_by_landlock):
            missing.append("landlock")
        _filter_calls()
    except (OSError, RuntimeError) as error:
        raise PermissionDenied(
            f"a worker cannot be jailed: {error}",
            hint="the agent has to be root with CAP_SYS_ADMIN, CAP_NET_ADMIN, CAP_SETUID, CAP_SETGID and CAP_SETPCAP, "
            "on a kernel with seccomp filters",
        ) from error
    return tuple(missing)


def end_with_parent(number: int) -> None:
    """Have this process get a signal when the thread that forked it ends."""
    _call("prctl", lib.prctl(lib.PR_SET_PDEATHSIG, number, 0, 0, 0))


def keep_capabilities(*kept: int) -> None:
    """Stay root, with what root's files and sockets give and these capabilities, and have no others again.

    Raises:
        OSError: not root.
    """
    _drop_bounding_set(kept)
    mask = sum(1 << capability for capability in kept)
    low, high = mask & 0xFFFFFFFF, mask >> 32
    header = struct.pack("=IiI", _CAPABILITY_VERSION, 0, 0)
    sets = struct.pack("=6I", low, low, 0, high, high, 0)  # effective, permitted, inheritable
    _call("capset", lib.syscall3(lib.SYS_capset, ffi.from_buffer(header), ffi.from_buffer(sets), 0))


def become_broker() -> None:
    """Keep root's files and sockets, and nothing else.

    Raises:
        OSError: not root.
    """
    _limits()
    keep_capabilities()
    _call("no_new_privs", lib.prctl(lib.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _succeeds(layer: Callable[[], None]) -> bool:
    try:
        layer()
    except (OSError, ValueError):  # the second is Python's word for a limit that may not be raised
        return False
    return True


def _call(what: str, result: int) -> int:
    if result < 0:
        raise OSError(ffi.errno, f"{what}: {os.strerror(ffi.errno)}")
    return result


def _own_namespaces() -> None:
    _call("unshare", lib.unshare(lib.CLONE_NEWIPC | lib.CLONE_NEWUTS | lib.CLONE_NEWNET))


def _empty_root() -> None:
    """Have a root without anything in it, and no other mount: so we keep no one's file system from going away."""
    _call("unshare", lib.unshare(lib.CLONE_NEWNS))
    # What is unmounted elsewhere until we are done is unmounted here too, and nothing of ours is seen there.
    _call("mount", lib.mount(ffi.NULL, b"/", ffi.NULL, lib.MS_REC | lib.MS_SLAVE, ffi.NULL))
    flags = lib.MS_NOSUID | lib.MS_NODEV | lib.MS_NOEXEC
    _call(
        "mount",
        lib.mount(b"none", b"/proc", b"tmpfs", flags, ffi.from_buffer(b"size=4k,nr_inodes=1,mode=555\0")),
    )
    os.chdir("/proc")
    # The old root lies on top of the new one then, and goes (pivot_root(2), "pivot_root(".", ".")").
    _call("pivot_root", lib.syscall3(lib.SYS_pivot_root, ffi.from_buffer(b".\0"), ffi.from_buffer(b".\0"), 0))
    _call("umount2", lib.umount2(b".", lib.MNT_DETACH))
    os.chdir("/")
    _call("mount", lib.mount(ffi.NULL, b"/", ffi.NULL, flags | lib.MS_REMOUNT | lib.MS_RDONLY, ffi.NULL))


def _memory_stays() -> None:
    """Have no page taken away that is used once: under want of memory it might be had back through a device like ours.

    Only as pages are touched: what is shared with the spawner, and never written, stays shared.
    """
    resource.setrlimit(resource.RLIMIT_MEMLOCK, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    _call("mlockall", lib.mlockall(lib.MCL_CURRENT | lib.MCL_FUTURE | lib.MCL_ONFAULT))


def _limits() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the memory of guests and pods
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    files = _MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_FILES)
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))


def _drop_bounding_set(kept: Collection[int] = ()) -> None:
    for capability in set(_CAPABILITIES) - set(kept):
        if lib.prctl(lib.PR_CAPBSET_DROP, capability, 0, 0, 0) and ffi.errno != errno.EINVAL:
            raise OSError(ffi.errno, f"dropping capability {capability}: {os.strerror(ffi.errno)}")


def _become(user: int) -> None:
    _drop_bounding_set()
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)  # and with root go the capabilities


def _no_files_by_landlock() -> None:
    version = lib.syscall3(
        lib.SYS_landlock_create_ruleset, ffi.NULL, ffi.NULL, lib.LANDLOCK_CREATE_RULESET_VERSION
    )
    _call("landlock_create_ruleset", version)
    files = (1 << _FILE_RIGHTS[min(version, max(_FILE_RIGHTS))]) - 1
    rules = struct.pack("=QQQ", files, _ALL_TCP if version >= 4 else 0, _ALL_SCOPES if version >= 6 else 0)
    size = 8 if version < 4 else 16 if version < 6 else 24
    ruleset = _call(
        "landlock_create_ruleset",
        lib.syscall3(lib.SYS_landlock_create_ruleset, ffi.from_buffer(rules), ffi.cast("void *", size), 0),
    )
    try:
        restricted = lib.syscall3(lib.SYS_landlock_restrict_self, ffi.cast("void *", ruleset), ffi.NULL, 0)
        _call("landlock_restrict_self", restricted)
    finally:
        os.close(ruleset)


def _filter_calls() -> None:
    """Refuse (EPERM) whatever is not on the list: a call that we forgot must not be the end of a volume."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ERRNO(errno.EPERM))
    rules.set_attr(pyseccomp.Attr.CTL_TSYNC, 1)  # whatever other thread there may be
    for name in _CALLS.split():
        _allow(rules, name)
    for mask, number in _IOCTLS:
        _allow(rules, "ioctl", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, mask, number))
    for name in ("mmap", "mprotect"):
        _allow(rules, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, 4, 0))  # not PROT_EXEC
    # An address of two bytes is none: it ends a connection, and can make no other (goodbye.c).
    _allow(rules, "connect", pyseccomp.Arg(2, pyseccomp.EQ, 2))
    _allow(rules, "prctl", pyseccomp.Arg(0, pyseccomp.EQ, lib.PR_SET_NAME))
    # Threads, and no processes. The C library falls back to clone from clone3, whose flags no filter sees.
    _allow(rules, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, lib.CLONE_THREAD, lib.CLONE_THREAD))
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")
    rules.load()


def _allow(rules: pyseccomp.SyscallFilter, name: str, *arguments: pyseccomp.Arg) -> None:
    with contextlib.suppress(ValueError):  # this architecture, or libseccomp, has no such call
        rules.add_rule(pyseccomp.ALLOW, name, *arguments)


# What may be missing; each is done before the worker is nobody. Only the last hides the files by which others work.
_LAYERS: Final = (
    ("limits", _limits),
    ("locked memory", _memory_stays),
    ("namespaces", _own_namespaces),
    ("empty root", _empty_root),
)
