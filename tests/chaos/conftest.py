"""Options of the chaos tests: how much of everything (--chaos), and the seed of all that is random (--chaos-seed).

A run says its seed at the start; with the same seed the same choices are made, though the machine's timing differs.
"""

from __future__ import annotations

import random
import secrets

import pytest

from tests.chaos.effort import EFFORTS, Effort


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--chaos", choices=sorted(EFFORTS), default="short", help="how much of everything")
    parser.addoption("--chaos-seed", type=int, default=None, help="default: a new one each time")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--chaos-seed") is None:
        config.option.chaos_seed = secrets.randbelow(1 << 32)


def pytest_report_header(config: pytest.Config) -> str:
    return f"chaos: {config.getoption('--chaos')}, --chaos-seed {config.getoption('--chaos-seed')}"


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    """How much of everything this run does."""
    return EFFORTS[request.config.getoption("--chaos")]


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """The run's seed; printed with every test that fails."""
    value: int = request.config.getoption("--chaos-seed")
    print(f"--chaos-seed {value}")
    return value


@pytest.fixture
def dice(seed: int, request: pytest.FixtureRequest) -> random.Random:
    """What a test draws its choices from: the same for the same seed and test, whichever tests run before it."""
    return random.Random(f"{seed} {request.node.nodeid}")
