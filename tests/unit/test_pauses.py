"""Pauses: which gap belongs to which event, what is kept of them, and what the report makes of it."""

from __future__ import annotations

import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from dataclasses import asdict
from pathlib import Path

import pytest

from bench import pause, plots, report, results
from bench.pause import AGENT_KILL, HANDOVER, KILL, NOTHING, Series
from bench.servers import BenchError
from lab.paths import CHECKOUT

MS = 1_000_000


def telling(text: str) -> list[str]:
    """A writer that says this, and then waits for its end."""
    script = f"import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit('x' in {text!r}));"
    script += f"print({text!r}, flush=True); signal.pause()"
    return [sys.executable, "-c", script]


def test_the_longest_gap_that_touches_an_event_is_its_pause() -> None:
    said = f"{0} {90 * MS}\n{100 * MS} {130 * MS}\n{130 * MS} {135 * MS}\n{200 * MS} {900 * MS}"
    writer = pause.Writer(telling(said))
    try:
        assert writer.longest_ms(110 * MS, 150 * MS) == 30.0
        assert writer.longest_ms(131 * MS, 150 * MS) == 5.0
        assert writer.longest_ms(850 * MS, 890 * MS) == 700.0
    finally:
        writer.kill()


def test_a_writer_that_saw_an_error_fails_the_measurement() -> None:
    with (
        pytest.raises(BenchError, match="writing: Input/output error"),
        pause.writing(
            [sys.executable, "-c", "print('error: writing: Input/output error'); exit(1)"]
        ) as writer,
    ):
        writer.longest_ms(0, 1)


def test_p99_of_a_hundred_leaves_one_out_and_of_a_few_none() -> None:
    assert pause.median_p99_max([float(n) for n in range(1, 101)]) == (50.5, 99.0, 100.0)
    assert pause.median_p99_max([1.0, 5.0]) == (3.0, 5.0, 5.0)


def test_measuring_one_event_again_keeps_the_others() -> None:
    old = pause.merged(
        None, [Series(KILL, 1, (1.0,)), Series(KILL, 20, (2.0,)), Series(HANDOVER, 1, (3.0,))], {}
    )
    new = pause.merged(old, [Series(KILL, 1, (9.0,))], {"cpus": 2})
    assert set(pause.series_of(new)) == {
        Series(KILL, 1, (9.0,)),
        Series(KILL, 20, (2.0,)),
        Series(HANDOVER, 1, (3.0,)),
    }
    assert new["conditions"] == {"cpus": 2}


def test_the_report_tells_pauses_against_their_targets() -> None:
    series = [
        Series(NOTHING, 1, (2.0, 3.0)),
        Series(KILL, 1, (100.0, 200.0)),
        Series(HANDOVER, 1, (10.0, 60.0)),
        Series(AGENT_KILL, 1, (2.5, 2.5)),
        Series(AGENT_KILL, 20, (400.0,)),
    ]
    figures = {"conditions": {}, "series": [asdict(each) for each in series]}
    text, drawings = report.make({"pause-native": figures}, "x/")
    assert "| worker kill -9 | 1 | 150 | 200 | 200 | 2 | p99 at most 300: met |" in text
    assert "p99 at most 50: **lost**" in text
    assert text.count("within what is normal: met") == 1, "of those with a calm time to compare with"
    assert set(drawings) == {"pause-native-1.svg", "pause-native-20.svg"}


def test_a_distribution_is_well_formed() -> None:
    root = ET.fromstring(plots.distribution("pauses", "ms", [("a", [1.0, 20.0, 300.0]), ("b", [5.0])]))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert {"1", "10", "100", "1000", "a", "b"} <= set(texts)


def test_the_writer_tells_how_far_it_is_and_ends_when_told(tmp_path: Path) -> None:
    program, image = tmp_path / "pauses", tmp_path / "image"
    source = CHECKOUT / "bench/pauses.c"
    subprocess.run(["cc", "-O1", "-o", program, source, "-luring"], check=True, timeout=120)
    with image.open("wb") as file:
        file.truncate(1 << 20)
    with pause.writing([str(program), str(image), str(1 << 20)]) as writer:
        begin = time.monotonic_ns()
        assert writer.longest_ms(begin, begin + 300 * MS) >= 1.0


def test_publishing_keeps_parts_that_were_not_measured_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAB_RESULTS", str(tmp_path / "results"))
    monkeypatch.setattr(report, "PUBLISHED", tmp_path)
    monkeypatch.setattr(report, "DOCUMENT", tmp_path / "performance.md")
    (tmp_path / "performance.md").write_text("# Performance\n")
    for event, part in ((KILL, "pause-native"), (HANDOVER, "pause")):
        results.save(part, {"quick": False, **pause.merged(None, [Series(event, 1, (1.0,))], {})})
        report.write(publish=True)
        (results.folder() / f"{part}.json").unlink()
    text = (tmp_path / "performance.md").read_text()
    assert "Pauses, native" in text
    assert "Pauses, in the VM" in text
