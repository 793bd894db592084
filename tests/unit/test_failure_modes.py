"""docs/failure-modes.md names tests that exist, and leaves none out."""

from __future__ import annotations

import ast
import re

from lab.paths import CHECKOUT

DOCUMENT = CHECKOUT / "docs/failure-modes.md"
CHAOS = CHECKOUT / "tests/chaos"
# They prove the tools of the others.
OF_TOOLS = {"test_ordered.py"}


def existing() -> set[str]:
    found = set()
    for path in CHAOS.rglob("test_*.py"):
        for node in ast.parse(path.read_text()).body:
            if (
                isinstance(node, ast.FunctionDef)
                and node.name.startswith("test_")
                and path.name not in OF_TOOLS
            ):
                found.add(f"{path.name}::{node.name}")
    return found


def rows() -> list[list[str]]:
    lines = [line.split("|")[1:-1] for line in DOCUMENT.read_text().splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line] for line in lines if line[0].strip() != "what happens"]


def test_each_row_tells_everything_and_names_a_test_that_exists() -> None:
    for row in rows():
        assert len(row) == 5, row
        assert all(row), row
        named = re.findall(r"`(test_\w+\.py::test_\w+)`", row[4])
        assert named, row
        assert set(named) <= existing(), row


def test_each_chaos_test_is_in_the_table() -> None:
    named = set(re.findall(r"`(test_\w+\.py::test_\w+)`", DOCUMENT.read_text()))
    assert named == existing()
