"""Tables and plots of the raw figures: markdown and SVG, in the results folder or, when published, in docs/.

What is kept true: everything between the two markers of docs/performance.md is made here from the JSON files in
docs/performance/, and nothing outside them is touched; void figures (--quick) are never published.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import pause, plots
from bench.results import OURS, PARTS, Missing, Run, folder, load, median, missing_of, runs_of
from bench.targets import TARGETS, Figures
from lab.paths import CHECKOUT

BEGIN, END = "<!-- bench: begin -->", "<!-- bench: end -->"
DOCUMENT = CHECKOUT / "docs/performance.md"
PUBLISHED = CHECKOUT / "docs/performance"
_PLOTTED = tuple(
    f"4k {operation} QD{depth}" for operation in ("randread", "randwrite") for depth in (1, 8, 32, 128)
)


@dataclass(frozen=True)
class _Measure:
    unit: str
    pick: Callable[[Run], float | None]


_IOPS = _Measure("IOPS", lambda run: run.iops)
_CPU = _Measure("microseconds of CPU per request", lambda run: run.cpu_us)


def write(*, publish: bool) -> Path:
    """Make the report of what was measured; returns its path. Parts not measured since stay as they were published.

    Raises RuntimeError when nothing was measured, or void figures are to be published.
    """
    figures: Figures = {part: load(part) for part in PARTS}
    if not any(figures.values()):
        raise RuntimeError("nothing was measured yet: `make bench`")
    where = folder() / "report"
    if publish:
        if void := [part for part, each in figures.items() if each and each.get("quick")]:
            raise RuntimeError(f"the figures of {', '.join(void)} are of a --quick run: void")
        where = PUBLISHED
        figures = {part: each or load(part, PUBLISHED) for part, each in figures.items()}
    where.mkdir(parents=True, exist_ok=True)
    links = "performance/" if publish else ""
    text, drawings = make(figures, links)
    for name, drawing in drawings.items():
        (where / name).write_text(drawing)
    if not publish:
        path = where / "report.md"
        path.write_text(text)
        return path
    for part, each in figures.items():
        if each:
            (where / f"{part}.json").write_text(json.dumps(each, separators=(",", ":")) + "\n")
    DOCUMENT.write_text(placed(DOCUMENT.read_text(), text))
    return DOCUMENT


def placed(document: str, text: str) -> str:
    """The document with the text between its markers, which are added at its end if it has none."""
    if BEGIN not in document:
        document = f"{document.rstrip()}\n\n{BEGIN}\n{END}\n"
    before, _, rest = document.partition(BEGIN)
    return f"{before}{BEGIN}\n{text}{END}{rest.partition(END)[2]}"


def make(figures: Figures, links: str) -> tuple[str, dict[str, str]]:
    """The report's text, and its plots by file name; `links` is put before those names in the text."""
    drawings = _Drawings(links)
    void = any(each and each.get("quick") for each in figures.values())
    text = "**Partly of a --quick run: these figures are void.**\n\n" if void else ""
    text += _targets(figures)
    for kind in ("file", "null"):
        text += _vm(figures.get("vm"), kind, drawings)
    for part, where in _REMOTE.items():
        text += _remote(figures.get(part), part, where, drawings)
    text += _native(figures.get("native"), drawings)
    text += _instructions(figures.get("instructions")) + _scale(figures.get("scale"), drawings)
    for part, where, bounds_ms in _PAUSES:
        text += _pauses(figures.get(part), part, where, bounds_ms, drawings)
    text += _missing([each for part in figures.values() for each in missing_of(part)])
    return text + _conditions(figures), drawings.made


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def number(value: float | None) -> str:
    """A figure as people read it; a dash where there is none."""
    if value is None:
        return "—"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _targets(figures: Figures) -> str:
    rows = []
    for target in TARGETS:
        measured = target.measure(figures)
        bound = "at least" if target.more else "at most"
        shown = "—" if measured is None else f"{measured:.2f} {target.unit}"
        asked = f"{bound} {target.at_least:g} {target.unit}"
        rows.append([target.text, asked, f"{target.beyond:g} {target.unit}", shown, target.verdict(measured)])
    return "### Targets\n\n" + table(["", "target", "beyond", "measured", ""], rows)


def _vm(part: dict[str, Any] | None, kind: str, drawings: _Drawings) -> str:
    runs = [run for run in runs_of(part) if run.kind == kind]
    if not runs:
        return ""
    what = f"an image on {(part or {})['conditions']['file_system']}" if kind == "file" else "null"
    text = f"### In the VM, {what}\n\n"
    for queues in sorted({run.queues for run in runs}):
        chosen = [run for run in runs if run.queues == queues]
        text += (
            f"Queues: {queues}. Latency in µs; CPU, of the machine and of the server's processes, in µs per "
        )
        text += "request; context switches per request.\n\n"
        text += _runs_table(chosen)
    single = [run for run in runs if run.queues == 1]
    jobs = [job for job in _PLOTTED if any(run.job == job for run in single)]
    title = f"VM, {kind}, one queue"
    text += drawings.runs(f"vm-{kind}-iops", title, single, jobs, _IOPS)
    return text + drawings.runs(f"vm-{kind}-cpu", title, single, jobs, _CPU)


_REMOTE = {
    "remote": "a remote disk: one nbdkit on another machine",
    "loopback": "a remote disk: one nbdkit on TCP loopback",
}


def _remote(part: dict[str, Any] | None, name: str, where: str, drawings: _Drawings) -> str:
    runs = runs_of(part)
    if not runs:
        return ""
    text = f"### In the VM, {where}\n\n"
    text += "Latency in µs; CPU, of the machine and of nbdkit if it runs there, in µs per request; context switches "
    text += "per request.\n\n"
    text += _runs_table(runs)
    if rows := (part or {}).get("syscalls"):
        head = ["server", "job", "system calls of its own per request"]
        text += table(head, [[row["server"], row["job"], number(row["calls_per_request"])] for row in rows])
    jobs = [job for job in _PLOTTED if any(run.job == job for run in runs)]
    return text + drawings.runs(f"{name}-iops", f"VM, {where}", runs, jobs, _IOPS)


def _native(part: dict[str, Any] | None, drawings: _Drawings) -> str:
    runs = runs_of(part)
    text = ""
    for kind in ("null", "file"):
        chosen = [run for run in runs if run.kind == kind]
        if not chosen:
            continue
        text += f"### Native, vhost-user, {kind}\n\n" + _runs_table(chosen)
        jobs = sorted({run.job for run in chosen})
        text += drawings.runs(f"native-{kind}-iops", f"vhost-user, {kind}", chosen, jobs, _IOPS)
    return text


def _runs_table(runs: Sequence[Run]) -> str:
    servers, jobs = list(dict.fromkeys(r.server for r in runs)), list(dict.fromkeys(r.job for r in runs))
    rows = []
    for job in jobs:
        base = median([r for r in runs if (r.server, r.job) == (OURS, job)], lambda r: r.iops)
        for server in servers:
            mine = [run for run in runs if (run.server, run.job) == (server, job)]
            rate = median(mine, lambda r: r.iops)
            if rate is None:
                continue
            figures = [rate, *(median(mine, pick) for pick in _PICKS)]
            rows.append(
                [job, server, *map(number, figures), number(base / rate if base else None), str(len(mine))]
            )
    head = [
        "job",
        "server",
        "IOPS",
        "mean",
        "p50",
        "p99",
        "p99.9",
        "CPU",
        "server CPU",
        "switches",
        "ours / it",
        "runs",
    ]
    return table(head, rows)


_PICKS: tuple[Callable[[Run], float | None], ...] = (
    lambda r: r.mean_us,
    lambda r: r.p50_us,
    lambda r: r.p99_us,
    lambda r: r.p999_us,
    lambda r: r.cpu_us,
    lambda r: r.server_cpu_us,
    lambda r: r.switches,
)


@dataclass(frozen=True)
class _Drawings:
    """The plots made so far, by file name, and what the text puts before those names."""

    links: str
    made: dict[str, str] = field(default_factory=dict)

    def add(self, name: str, title: str, unit: str, drawing: str) -> str:
        """Keep a plot; returns the text that shows it."""
        self.made[f"{name}.svg"] = drawing
        return f"![{title}, {unit}]({self.links}{name}.svg)\n\n"

    def runs(self, name: str, title: str, runs: Sequence[Run], jobs: Sequence[str], measure: _Measure) -> str:
        """The same, of a figure of the runs of these jobs."""
        servers = list(dict.fromkeys(run.server for run in runs))
        series = [
            (s, [median([r for r in runs if (r.server, r.job) == (s, job)], measure.pick) for job in jobs])
            for s in servers
        ]
        return self.add(name, title, measure.unit, plots.bars(title, measure.unit, jobs, series))


def _instructions(part: dict[str, Any] | None) -> str:
    if not part:
        return ""
    rows = [[cost["way"], number(cost["instructions"])] for cost in part["costs"]]
    first = number(part["engine_to_first_request_us"])
    text = "### Instructions per request of the ring path (callgrind, null backend)\n\n" + table(
        ["", "instructions"], rows
    )
    return f"{text}From making an engine to its first request served: {first} µs.\n\n"


def _scale(part: dict[str, Any] | None, drawings: _Drawings) -> str:
    if not part:
        return ""
    text = "### What idle volumes cost, in the VM\n\nPer worker, medians; CPU is of all workers together.\n\n"
    for key in ("rows", "queue_rows"):
        if rows := part[key]:
            text += table(
                [each.replace("_", " ") for each in rows[0]],
                [[number(v) for v in row.values()] for row in rows],
            )
    rows = part["rows"]
    groups = [f"{row['volumes']:g} volumes" for row in rows]
    series = [
        (name, [row[key] for row in rows]) for name, key in (("private", "private_mib"), ("PSS", "pss_mib"))
    ]
    title = "Memory of a worker"
    return text + drawings.add("scale", title, "MiB", plots.bars(title, "MiB", groups, series))


# Where pauses are measured, and the targets of issue 5: the most that p99 may be.
_PAUSES: tuple[tuple[str, str, Mapping[str, float]], ...] = (
    ("pause-native", "native, vhost-user", {pause.KILL: 300.0, pause.HANDOVER: 50.0}),
    ("pause", "in the VM", {pause.KILL: 3000.0, pause.HANDOVER: 1000.0}),
)
_UNHURT = (pause.AGENT_KILL, pause.UPGRADE)


def _pauses(
    part: dict[str, Any] | None, name: str, where: str, bounds_ms: Mapping[str, float], drawings: _Drawings
) -> str:
    series = pause.series_of(part)
    if not series:
        return ""
    calm = {each.volumes: each.pauses_ms for each in series if each.event == pause.NOTHING}
    rows = []
    for each in series:
        middle, high, most = pause.median_p99_max(each.pauses_ms)
        target = _pause_verdict(each, bounds_ms, calm.get(each.volumes, ()))
        rows.append(
            [
                each.event,
                str(each.volumes),
                *map(number, (middle, high, most)),
                str(len(each.pauses_ms)),
                target,
            ]
        )
    title = f"Pauses, {where}"
    text = f"### {title}\n\nThe longest time in which no write came back, per event, in ms. Each event hits all the "
    text += "volumes; the writer is on the one that was started last.\n\n"
    text += table(["event", "volumes", "median", "p99", "max", "events", "target"], rows)
    for volumes in dict.fromkeys(each.volumes for each in series):
        chosen = [(each.event, each.pauses_ms) for each in series if each.volumes == volumes]
        head = f"{title}, volumes: {volumes}"
        text += drawings.add(f"{name}-{volumes}", head, "ms", plots.distribution(head, "ms", chosen))
    return text


def _pause_verdict(series: pause.Series, bounds_ms: Mapping[str, float], calm_ms: Sequence[float]) -> str:
    _, high, _ = pause.median_p99_max(series.pauses_ms)
    if series.event in bounds_ms:
        bound = bounds_ms[series.event]
        return f"p99 at most {number(bound)}: {'met' if high <= bound else '**lost**'}"
    if series.event in _UNHURT and calm_ms:
        # No pause of its own: what is left is the machine's, which has its pauses without any event.
        middle, (_, calm_high, _) = pause.median_p99_max(series.pauses_ms)[0], pause.median_p99_max(calm_ms)
        return f"median within what is normal: {'met' if middle <= calm_high else '**lost**'}"
    return ""


def _missing(missing: Sequence[Missing]) -> str:
    if not missing:
        return ""
    rows = [
        [each.server, each.kind, each.what, " ".join(each.reason.split()).replace("|", "/")]
        for each in missing
    ]
    return "### Not measured\n\n" + table(["server", "kind", "what", "why"], rows)


def _conditions(figures: Figures) -> str:
    text = "### Conditions\n\n"
    for part, each in figures.items():
        if each:
            words = ", ".join(f"{key} {value}" for key, value in each["conditions"].items())
            text += f"- {part}: {words}{', quick' if each.get('quick') else ''}.\n"
    return text
