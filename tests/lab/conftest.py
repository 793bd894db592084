"""The `machine` fixture: a machine of each kind, booted once for the session, and again after a test that kills it."""

from collections.abc import Iterator

import pytest

from lab.machine import Machine

KINDS = ("qemu", "uml")


@pytest.fixture(scope="session", params=KINDS)
def session_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    with Machine(kind=request.param) as booted:
        yield booted


@pytest.fixture
def machine(session_machine: Machine) -> Machine:
    """A running machine, shared by all tests of the session."""
    if not session_machine.alive():
        session_machine.power_cut()
        session_machine.boot()
    return session_machine
