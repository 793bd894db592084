"""Bar charts and distributions as SVG text, without a library: readable on light and dark pages, and small."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

_WIDTH, _ROW, _GAP, _LEFT, _RIGHT, _TOP = 760, 17, 12, 150, 90, 60
_MARGIN = 44
_COLORS = ("#2f81f7", "#e0823d", "#57ab5a", "#b083f0", "#c9463d", "#8b949e")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.title{font-size:15px;font-weight:600}"
    "@media(prefers-color-scheme:dark){text{fill:#e6edf3}}"
)


def bars(
    title: str, unit: str, groups: Sequence[str], series: Sequence[tuple[str, Sequence[float | None]]]
) -> str:
    """A group of horizontal bars for each of `groups`, a bar for each of `series`; None leaves its place empty."""
    most = max((value for _, values in series for value in values if value), default=1.0)
    scale = (_WIDTH - _LEFT - _RIGHT) / most
    height = _TOP + len(groups) * (len(series) * _ROW + _GAP)
    parts = _head(title, unit, height, [name for name, _ in series])
    y = _TOP
    for group, label in enumerate(groups):
        parts.append(f'<text x="8" y="{y + _ROW * len(series) / 2 + 4:.0f}">{escape(label)}</text>')
        for index, (_, values) in enumerate(series):
            value = values[group]
            if value is not None:
                length, at = value * scale, f'y="{y + 2}" height="{_ROW - 4}"'
                text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
                parts.append(f'<rect x="{_LEFT}" width="{length:.1f}" {at} fill="{_color(index)}"/>')
                parts.append(f'<text x="{_LEFT + length + 5:.1f}" y="{y + _ROW - 5}">{text}</text>')
            y += _ROW
        y += _GAP
    return "\n".join([*parts, "</svg>"]) + "\n"


def distribution(title: str, unit: str, series: Sequence[tuple[str, Sequence[float]]]) -> str:
    """For each of `series` the share of its values, which are positive, that are at most x; x is logarithmic."""
    values = [value for _, each in series for value in each]
    first = math.floor(math.log10(min(values, default=1.0)))
    last = max(first + 1, math.ceil(math.log10(max(values, default=10.0))))
    plot_width, plot_height = _WIDTH - 2 * _MARGIN, 240

    def x_of(value: float) -> float:
        return _MARGIN + (math.log10(value) - first) / (last - first) * plot_width

    def y_of(share: float) -> float:
        return _TOP + (1 - share) * plot_height

    parts = _head(title, unit, _TOP + plot_height + 30, [name for name, _ in series])
    for power in range(first, last + 1):
        x = x_of(10.0**power)
        parts.append(f'<path d="M{x:.1f} {y_of(1):.0f}V{y_of(0):.0f}" stroke="#8b949e" stroke-width=".5"/>')
        parts.append(f'<text x="{x - 8:.1f}" y="{y_of(0) + 18:.0f}">{10.0**power:g}</text>')
    for share in (0.0, 0.5, 0.99, 1.0):
        y = y_of(share)
        parts.append(f'<path d="M{_MARGIN} {y:.1f}H{_WIDTH - _MARGIN}" stroke="#8b949e" stroke-width=".5"/>')
        if share in {0.5, 0.99}:
            parts.append(f'<text x="6" y="{y + 4:.1f}">{share:.0%}</text>')
    for index, (_, each) in enumerate(series):
        path, share = "", 0.0
        for number, value in enumerate(sorted(each), 1):
            path += (
                f"{'L' if path else 'M'}{x_of(value):.1f} {y_of(share):.1f}V{y_of(number / len(each)):.1f}"
            )
            share = number / len(each)
        parts.append(f'<path d="{path}" fill="none" stroke="{_color(index)}" stroke-width="2"/>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _head(title: str, unit: str, height: int, names: Sequence[str]) -> list[str]:
    """The beginning of a drawing: title, and the key to its colours."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}, {escape(unit)}</text>',
    ]
    x = 8.0
    for index, name in enumerate(names):
        parts.append(f'<rect x="{x:.0f}" y="31" width="11" height="11" fill="{_color(index)}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="41">{escape(name)}</text>')
        x += 32 + 7 * len(name)
    return parts


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
