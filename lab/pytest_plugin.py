"""The `machine` fixture: one boot for a whole test session.

For tests that look at a guest from outside; import it in a conftest.py. Tests that run *inside* the guest
need nothing of it: `python -m lab run -- .venv/bin/python -m pytest tests/vm`. What is kept true: a test that
kills or panics the machine does not spoil the next one, which gets it booted again.
"""

from collections.abc import Iterator

import pytest

from lab.machine import Machine


@pytest.fixture(scope="session")
def _session_machine() -> Iterator[Machine]:
    with Machine() as booted:
        yield booted


@pytest.fixture
def machine(_session_machine: Machine) -> Machine:
    """A running machine, shared by all tests of the session."""
    if not _session_machine.alive():
        _session_machine.power_cut()
        _session_machine.boot()
    return _session_machine


__all__ = ["_session_machine", "machine"]
