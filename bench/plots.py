"""Bar charts as SVG text, without a library: readable on light and dark pages, small enough to commit."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

_WIDTH, _ROW, _GAP, _LEFT, _RIGHT, _TOP = 760, 17, 12, 150, 90, 60
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
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img">',
        f"<title>{escape(title)}</title><style>{_STYLE}</style>",
        f'<text class="title" x="8" y="20">{escape(title)}, {escape(unit)}</text>',
    ]
    x = 8.0
    for index, (name, _) in enumerate(series):
        parts.append(f'<rect x="{x:.0f}" y="31" width="11" height="11" fill="{_color(index)}"/>')
        parts.append(f'<text x="{x + 15:.0f}" y="41">{escape(name)}</text>')
        x += 32 + 7 * len(name)
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


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]
