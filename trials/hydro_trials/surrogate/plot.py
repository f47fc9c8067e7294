"""Charts as SVG, alone or in a self-contained HTML page: no library, no script, nothing to load."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass

_COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377", "#888888")
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 560, 340, 70, 170, 34, 46


@dataclass(frozen=True)
class Line:
    """One series; points that are not finite, or not positive, are left out."""

    label: str
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False


def chart(title: str, x_label: str, y_label: str, lines: Sequence[Line], *, log_y: bool = True) -> str:
    """An SVG line chart; x is logarithmic, y if wanted."""
    series = [(line, [(x, y) for x, y in zip(line.xs, line.ys, strict=True) if _shown(y, log_y)]) for line in lines]
    points = [point for _, shown in series for point in shown]
    if not points:
        return f"<p>{html.escape(title)}: nothing to show</p>"
    x_axis = _Axis(min(x for x, _ in points), max(x for x, _ in points), True, _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(min(y for _, y in points), max(y for _, y in points), log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" width="{_WIDTH}" '
        f'height="{_HEIGHT}" font-family="sans-serif" font-size="11">',
        f'<text x="{_LEFT}" y="18" font-size="13" font-weight="bold">{html.escape(title)}</text>',
        f'<rect x="{_LEFT}" y="{_TOP}" width="{_WIDTH - _RIGHT - _LEFT}" height="{_HEIGHT - _BOTTOM - _TOP}" '
        'fill="none" stroke="#999"/>',
        f'<text x="{(_LEFT + _WIDTH - _RIGHT) / 2}" y="{_HEIGHT - 8}" text-anchor="middle">'
        f"{html.escape(x_label)}</text>",
        f'<text transform="translate(14 {(_TOP + _HEIGHT - _BOTTOM) / 2}) rotate(-90)" text-anchor="middle">'
        f"{html.escape(y_label)}</text>",
    ]
    for value in x_axis.ticks():
        at = x_axis.place(value)
        parts.append(f'<line x1="{at:.1f}" y1="{_TOP}" x2="{at:.1f}" y2="{_HEIGHT - _BOTTOM}" stroke="#eee"/>')
        parts.append(f'<text x="{at:.1f}" y="{_HEIGHT - _BOTTOM + 14}" text-anchor="middle">{value:.3g}</text>')
    for value in y_axis.ticks():
        at = y_axis.place(value)
        parts.append(f'<line x1="{_LEFT}" y1="{at:.1f}" x2="{_WIDTH - _RIGHT}" y2="{at:.1f}" stroke="#eee"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    for number, (line, shown) in enumerate(series):
        colour = _COLOURS[number % len(_COLOURS)]
        path = " ".join(f"{x_axis.place(x):.1f},{y_axis.place(y):.1f}" for x, y in shown)
        dash = ' stroke-dasharray="5 3"' if line.dashed else ""
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"{dash}/>')
        if number < 18:
            y = _TOP + 8 + 15 * number
            parts.append(
                f'<line x1="{_WIDTH - _RIGHT + 8}" y1="{y}" x2="{_WIDTH - _RIGHT + 26}" y2="{y}" stroke="{colour}" '
                f'stroke-width="2"{dash}/><text x="{_WIDTH - _RIGHT + 30}" y="{y + 4}">'
                f"{html.escape(line.label[-24:])}</text>"
            )
    return "\n".join([*parts, "</svg>"])


def side_by_side(charts: Sequence[str]) -> str:
    """Several charts as one SVG image."""
    placed = [text.replace("<svg ", f'<svg x="{number * _WIDTH}" ', 1) for number, text in enumerate(charts)]
    size = f'viewBox="0 0 {_WIDTH * len(charts)} {_HEIGHT}" width="{_WIDTH * len(charts)}" height="{_HEIGHT}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><rect width="100%" height="100%" fill="white"/>'
    return "\n".join([head, *placed, "</svg>", ""])


def page(title: str, sections: Sequence[str]) -> str:
    """A whole HTML document; sections are HTML already."""
    head = f"<!doctype html><html><head><meta charset='utf-8'><title>{html.escape(title)}</title>"
    style = "<style>body{font-family:sans-serif;max-width:1180px;margin:2em auto}svg{margin:.5em}</style></head>"
    return "\n".join([head + style, f"<body><h1>{html.escape(title)}</h1>", *sections, "</body></html>", ""])


def paragraphs(lines: Sequence[str]) -> str:
    """Plain text as HTML."""
    return "\n".join(f"<p>{html.escape(line)}</p>" for line in lines)


@dataclass(frozen=True)
class _Axis:
    low: float
    high: float
    logarithmic: bool
    start: float
    end: float

    def place(self, value: float) -> float:
        low, high, at = (math.log(v) if self.logarithmic else v for v in (self.low, self.high, value))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        if not self.logarithmic:
            return [self.low + (self.high - self.low) * step / 4 for step in range(5)]
        ratio = (self.high / self.low) ** 0.25
        return [self.low * ratio**step for step in range(5)] if ratio > 1 else [self.low]


def _shown(value: float, log_y: bool) -> bool:
    return math.isfinite(value) and (value > 0 or not log_y)
