"""What a run of the suite came to, read from its JUnit file. Values and text; nothing here acts.

What is kept true: a spec is in exactly one list, specs that were filtered out by name are in none, and a failed step of
the whole suite (its set-up, its clean-up) counts as a failed spec.
"""

import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

_SPEC = "[It] "
_PREFIX = "[It] External Storage [Driver: csi.vduse.dev] "
_SKIPPED = "skipped - "


class Result(Enum):
    """How a spec ended."""

    PASSED = "passed"
    SKIPPED = "skipped"
    FAILED = "failed"


@dataclass(frozen=True)
class Spec:
    """One spec that ran, or that the suite itself skipped. reason: empty if it passed; one line."""

    name: str
    result: Result
    seconds: float
    reason: str = ""


def read(junit: Path) -> list[Spec]:
    """All specs that were not filtered out, in the order of their names."""
    cases = ET.parse(junit).getroot().iter("testcase")  # noqa: S314 -- our own tests wrote it
    return sorted((spec for case in cases if (spec := _spec(case))), key=lambda spec: spec.name)


def failed(specs: Sequence[Spec]) -> bool:
    """Whether something failed, or nothing was tested at all."""
    results = {spec.result for spec in specs}
    return Result.FAILED in results or Result.PASSED not in results


def text(specs: Sequence[Spec]) -> str:
    """The lists, failures last, and the counts."""
    lines = []
    for result in Result:
        chosen = [spec for spec in specs if spec.result is result]
        for spec in chosen:
            lines += [f"{result.value} {spec.seconds:4.0f} s  {spec.name}"]
            lines += [f"                {spec.reason}"] if spec.reason else []
    counts = {result: sum(spec.result is result for spec in specs) for result in Result}
    lines.append(", ".join(f"{count} {result.value}" for result, count in counts.items()))
    return "\n".join(lines)


def _spec(case: ET.Element) -> Spec | None:
    name = case.get("name", "")
    seconds = float(case.get("time", "0"))
    short = name.removeprefix(_PREFIX)
    for wrong in ("failure", "error"):
        if (found := case.find(wrong)) is not None:
            return Spec(short, Result.FAILED, seconds, _reason(found))
    skipped = case.find("skipped")
    if skipped is not None:
        reason = skipped.get("message", "")
        # Without a reason it was filtered out by its name.
        said = reason.startswith(_SKIPPED)
        return Spec(short, Result.SKIPPED, seconds, reason.removeprefix(_SKIPPED)) if said else None
    return Spec(short, Result.PASSED, seconds) if name.startswith(_SPEC) else None


def _reason(failure: ET.Element) -> str:
    lines = [line.strip() for line in f"{failure.text or ''}\n{failure.get('message', '')}".splitlines()]
    return next((line.removeprefix("[FAILED] ") for line in lines if line), "no reason given")
