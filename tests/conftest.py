"""Where a test of a VDUSE kernel runs: `--lane` chooses among those that a machine can prove something with.

A test runs in user-mode Linux, which is quick; one marked `emulated(reason)` needs what that has not: processors in
parallel, Debian's own kernel, its timing. `--lane=all`, the default, leaves none out; `native` and `emulated` together
are all (tests/unit/lab/test_lanes.py).
"""

from __future__ import annotations

import pytest

LANES = ("all", "native", "emulated")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lane", choices=LANES, default="all", help="which tests, by where they have to run")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulated(reason): needs an emulated machine, and says why")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lane = config.getoption("--lane")
    kept = [item for item in items if lane in {"all", _lane(item)}]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


def _lane(item: pytest.Item) -> str:
    marker = item.get_closest_marker("emulated")
    if marker is None:
        return "native"
    if not marker.args:
        raise pytest.UsageError(f"{item.nodeid}: `emulated` wants the reason")
    return "emulated"
