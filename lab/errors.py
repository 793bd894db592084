"""Everything that can go wrong with a laboratory machine; one small tree.

    LabError
    ├── LabSetupError     a tool, package or kernel could not be had
    ├── BootError         the machine did not come up
    ├── GuestDied         QEMU ended while it was in use
    │   └── GuestPanic    ... because the guest's kernel panicked
    ├── GuestHung         the guest no longer answers
    ├── CommandFailed     a command that was to succeed ended with another exit code than 0
    └── CommandTimeout    a command ran too long and was killed in the guest; the machine is still good

What is kept true: every message says what happened and what to do, and those about a guest carry its last
console lines.
"""


class LabError(Exception):
    """Base of all errors of the laboratory."""


class LabSetupError(LabError):
    """Something that the laboratory needs from the host or from a package archive is missing."""


class BootError(LabError):
    """The machine did not come up."""


class GuestDied(LabError):
    """QEMU ended while the machine was in use."""


class GuestPanic(GuestDied):
    """The guest's kernel panicked."""


class GuestHung(LabError):
    """The guest no longer answers, although QEMU runs."""


class CommandFailed(LabError):
    """A command ended with an exit code other than 0."""


class CommandTimeout(LabError):
    """A command exceeded its time and was killed, with all its children; the machine is still good."""
