"""What the benchmarks make of figures; that they measure is proved by `make bench-quick`."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from bench import cpu, plots, report, results
from bench.results import OURS, QSD, Missing, Run
from bench.targets import TARGETS, ratio

BEFORE = """cpu  10 0 20 1000 5 1 2 0 0 0
cpu0 10 0 20 1000 5 1 2 0 0 0
ctxt 5000
17 (a ) b) S 1 17 17 0 -1 4194560 1 0 0 0 30 40 0 0 20 0 1 0 100 1 1
"""
AFTER = """cpu  60 0 70 2000 5 1 2 0 0 0
ctxt 5600
17 (a ) b) S 1 17 17 0 -1 4194560 1 0 0 0 50 70 0 0 20 0 1 0 100 1 1
"""
RUN = Run(OURS, "file", "4k randread QD32", 1, 0, 1000.0, 10.0, 20.0, 5.0, 2.0, 1.0)


def figures(*runs: Run, missing: tuple[Missing, ...] = (), quick: bool = False) -> dict[str, object]:
    return {
        "conditions": {"file_system": "tmpfs"},
        "runs": [asdict(run) for run in runs],
        "missing": [asdict(each) for each in missing],
        "quick": quick,
    }


def test_cpu_time_leaves_idling_out_and_reads_names_with_parentheses() -> None:
    used = cpu.parse(AFTER).since(cpu.parse(BEFORE))
    assert (used.machine_s, used.server_s, used.switches) == (pytest.approx(1.0), pytest.approx(0.5), 600)


def test_a_ratio_is_of_medians_and_the_worst_of_its_jobs() -> None:
    peer = replace(RUN, server="loop", iops=500.0)
    mine = [replace(RUN, round=n, iops=iops) for n, iops in enumerate((900.0, 1000.0, 9000.0))]
    other = replace(RUN, job="4k randwrite QD32", iops=400.0)
    runs = figures(*mine, peer, other, replace(other, server="loop"))
    assert ratio("vm", "file", [RUN.job], "loop")({"vm": runs}) == 2.0
    assert ratio("vm", "file", [RUN.job, other.job], "loop")({"vm": runs}) == 1.0


def test_of_a_peer_with_variants_the_fastest_counts() -> None:
    variants = [
        replace(RUN, server=f"{QSD} {name}", iops=iops) for name, iops in (("a", 250.0), ("b", 500.0))
    ]
    assert ratio("native", "file", [RUN.job], QSD)({"native": figures(RUN, *variants)}) == 2.0


def test_a_target_without_figures_is_not_measured_rather_than_met() -> None:
    for target in TARGETS:
        measured = target.measure(dict.fromkeys(results.PARTS))
        assert target.verdict(measured) == "not measured"


def test_a_target_says_met_beyond_and_lost() -> None:
    more, less = TARGETS[0], next(target for target in TARGETS if not target.more and target.at_least)
    assert [more.verdict(value) for value in (1.2, 1.3, 1.8)] == ["**lost**", "met", "met, and beyond"]
    assert less.verdict(less.at_least + 1) == "**lost**"
    assert less.verdict(less.beyond) == "met, and beyond"


def test_what_could_not_be_measured_is_in_the_report() -> None:
    missing = (Missing("ublk", "file", "queues: 1", "no rublk | here\nat all"),)
    text, drawings = report.make({"vm": figures(RUN, missing=missing)}, "x/")
    assert "| ublk | file | queues: 1 | no rublk / here at all |" in text
    assert "x/vm-file-iops.svg" in text
    assert set(drawings) == {"vm-file-iops.svg", "vm-file-cpu.svg"}
    assert "void" not in text


def test_a_quick_run_is_called_void_and_cannot_be_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_RESULTS", str(tmp_path))
    results.save("vm", figures(RUN, quick=True))
    assert "void" in report.write(publish=False).read_text()
    with pytest.raises(RuntimeError, match="void"):
        report.write(publish=True)


def test_the_document_keeps_what_is_outside_the_markers() -> None:
    once = report.placed("# Performance\n\ntext\n", "tables\n")
    again = report.placed(once + "\nmore\n", "others\n")
    assert once == f"# Performance\n\ntext\n\n{report.BEGIN}\ntables\n{report.END}\n"
    assert again == f"# Performance\n\ntext\n\n{report.BEGIN}\nothers\n{report.END}\n\nmore\n"


def test_a_plot_is_well_formed_and_leaves_gaps_for_what_is_missing() -> None:
    root = ET.fromstring(
        plots.bars("a < b", "IOPS", ["one", "two"], [("x", [1.0, None]), ("y", [2.0, 12345.0])])
    )
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert "12,345" in texts
    assert texts.count("x") == 1
