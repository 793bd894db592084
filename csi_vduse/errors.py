"""Every error a user or a caller can see, in one tree.

VduseError                     INTERNAL
├── InvalidArgument            INVALID_ARGUMENT
├── NotFound                   NOT_FOUND
├── AlreadyExists              ALREADY_EXISTS
├── Pending                    ABORTED              another call for the same object is running; retry
├── FailedPrecondition         FAILED_PRECONDITION  the object is in a state that forbids the call
├── OutOfRange                 OUT_OF_RANGE
├── ResourceExhausted          RESOURCE_EXHAUSTED
├── PermissionDenied           PERMISSION_DENIED
├── Unimplemented              UNIMPLEMENTED
├── Unavailable                UNAVAILABLE          something we depend on is away; retry
├── DeadlineExceeded           DEADLINE_EXCEEDED    a bounded step took too long; retry continues it
├── DataLoss                   DATA_LOSS
├── CommandFailed              INTERNAL             a program exited with an error
├── ProtocolError              INVALID_ARGUMENT     the other end of a socket broke the protocol
└── DeviceBroken               INTERNAL             the kernel has given a VDUSE device up for good

The codes are names, not grpc objects: workers raise these too and never import grpc.
The text says what was wrong; the hint says what to do about it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar


class VduseError(Exception):
    """Something went wrong that no narrower class describes.

    Args:
        message: what was wrong, with the names and values involved.
        hint: what the reader can do about it; empty if the message already says so.
    """

    grpc_code: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class InvalidArgument(VduseError):
    """A request or option has a value that can never work."""

    grpc_code = "INVALID_ARGUMENT"


class NotFound(VduseError):
    """The named object does not exist."""

    grpc_code = "NOT_FOUND"


class AlreadyExists(VduseError):
    """The named object exists and differs from what was asked for."""

    grpc_code = "ALREADY_EXISTS"


class Pending(VduseError):
    """Another operation on the same object is in progress; retrying later is right."""

    grpc_code = "ABORTED"


class FailedPrecondition(VduseError):
    """The object is in a state that forbids the operation."""

    grpc_code = "FAILED_PRECONDITION"


class OutOfRange(VduseError):
    """A size or index lies outside what the volume or pool allows."""

    grpc_code = "OUT_OF_RANGE"


class ResourceExhausted(VduseError):
    """There is no room left: pool capacity, device slots, memory."""

    grpc_code = "RESOURCE_EXHAUSTED"


class PermissionDenied(VduseError):
    """The kernel or the file system refused us."""

    grpc_code = "PERMISSION_DENIED"


class Unimplemented(VduseError):
    """The driver does not offer this."""

    grpc_code = "UNIMPLEMENTED"


class Unavailable(VduseError):
    """Something we depend on is away; the caller should retry."""

    grpc_code = "UNAVAILABLE"


class DeadlineExceeded(VduseError):
    """A step that can hang was given up after its time; a retry continues it."""

    grpc_code = "DEADLINE_EXCEEDED"


class DataLoss(VduseError):
    """Stored data or metadata is damaged."""

    grpc_code = "DATA_LOSS"


class CommandFailed(VduseError):
    """A program that we ran exited with an error.

    Args:
        argv: the command.
        exit_code: its exit status; negative for a signal.
        output: the last lines of what it printed.
    """

    def __init__(self, argv: Sequence[str], exit_code: int, output: str) -> None:
        super().__init__(f"`{' '.join(argv)}` exited with {exit_code}: {output.strip() or 'no output'}")
        self.argv = tuple(argv)
        self.exit_code = exit_code
        self.output = output


class ProtocolError(VduseError):
    """The other end of a socket sent what its protocol does not allow, or what was not negotiated."""

    grpc_code = "INVALID_ARGUMENT"


class DeviceBroken(VduseError):
    """The kernel has marked a VDUSE device broken: a control message went unanswered for msg_timeout.

    Nothing clears that state but destroying the device (vduse_dev_broken in vduse_dev.c).
    """
