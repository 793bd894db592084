"""Mount options: which ones a user may give, and how ours and theirs are put together; pure.

Options arrive as a list and go to mount(8) as one argument, so an option must not be able to end itself and
begin another. Options that would mount something else than the volume's device, or another way, are refused.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from csi_vduse.errors import InvalidArgument

# NAME, NAME=VALUE or NAME="VALUE"; a comma only within quotes, as in an SELinux context.
_OPTION = re.compile(r'[A-Za-z0-9_][A-Za-z0-9_.+-]*(=("[^"\\\s]*"|[A-Za-z0-9_.:/@%+-]*))?')
# What these do is decided by the driver, or concerns devices and files other than the volume.
_REFUSED = frozenset(
    {"bind", "rbind", "move", "remount", "private", "slave", "shared", "unbindable"}
    | {"loop", "offset", "sizelimit", "helper", "uhelper", "fstab"}
    | {"user", "users", "owner", "group", "auto", "noauto"}
    | {"device", "degraded", "logdev", "rtdev", "journal_dev", "journal_path"}
)
# Mount a file system whose log is not replayed, which the kernel allows read-only only (ext4, xfs, btrfs).
_NEED_READ_ONLY = frozenset({"norecovery", "noload", "nologreplay", "rescue"})


def check_options(options: Sequence[str]) -> None:
    """Refuse options that mount(8) would read as something else than one option of a file system.

    Raises:
        InvalidArgument: names the option, without its value, which may be a secret.
    """
    for option in options:
        name = option.partition("=")[0]
        if not _OPTION.fullmatch(option):
            raise InvalidArgument(
                f"mount option {name[:40]!r} is malformed",
                hint="give one NAME or NAME=VALUE for each list entry",
            )
        if name in _REFUSED or name.startswith("x-"):
            raise InvalidArgument(
                f"mount option {name!r} is not allowed", hint="the driver decides what is mounted"
            )


def of_staging(wanted: Sequence[str]) -> tuple[str, ...]:
    """Return the options for the mount that a volume's targets are bound from.

    ``ro`` is the target's alone: the file system is mounted writable below it, so that it can replay its log and grow,
    and so that one that has become read-only is known for a broken one. Unless another option cannot be without it.
    """
    if any(option.partition("=")[0] in _NEED_READ_ONLY for option in wanted):
        return tuple(wanted)
    return tuple(option for option in wanted if option != "ro")


def combine(defaults: Sequence[str], wanted: Sequence[str], *, read_only: bool) -> tuple[str, ...]:
    """Return the options for the mount: the file system's own, the user's, and ``ro``; each once.

    Raises:
        InvalidArgument: ``rw`` is asked for a volume that is read-only.
    """
    check_options(wanted)
    if read_only and "rw" in wanted:
        raise InvalidArgument("mount option 'rw' contradicts a read-only access mode")
    mode = ("ro",) if read_only else ()
    return tuple(dict.fromkeys([*mode, *defaults, *wanted]))
