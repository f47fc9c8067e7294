"""Plots as inline SVG, so that a report is one file that needs nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH, HEIGHT = 760, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 60, 150, 16, 40
COLOURS = ("#3b6ea5", "#d1495b", "#3f8f5b", "#b07aa1", "#e39a2d", "#6b6b6b", "#17a2a2", "#8c564b")

Points = Sequence[tuple[float, float]]


def line_plot(
    series: Sequence[tuple[str, Points]], x_label: str, y_label: str, *, steps: bool = False, log_x: bool = False
) -> str:
    """Lines over common axes; `steps` draws stairs (for CDFs and what is constant in between)."""
    points = [point for _, line in series for point in line]
    if not points:
        return "<p>nothing to plot</p>"
    log_x = log_x and min(x for x, _ in points) > 0

    def transform(x: float) -> float:
        return math.log10(x) if log_x else x

    low_x, high_x = min(transform(x) for x, _ in points), max(transform(x) for x, _ in points)
    low_y, high_y = min(0.0, *(y for _, y in points)), max(y for _, y in points)
    span_x, span_y = (high_x - low_x) or 1.0, (high_y - low_y) or 1.0

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            _LEFT + (transform(x) - low_x) / span_x * (WIDTH - _LEFT - _RIGHT),
            HEIGHT - _BOTTOM - (y - low_y) / span_y * (HEIGHT - _TOP - _BOTTOM),
        )

    parts = [_axes(x_label, y_label)]
    for value in _ticks(low_y, high_y):
        _, y = place(10**low_x if log_x else low_x, value)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:g}</text>')
    shown = [10**k for k in range(math.ceil(low_x), math.floor(high_x) + 1)] if log_x else _ticks(low_x, high_x)
    for value in shown:
        x, _ = place(value, low_y)
        parts.append(f'<text x="{x:.1f}" y="{HEIGHT - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for index, (name, line) in enumerate(series):
        colour = COLOURS[index % len(COLOURS)]
        path = _path([place(x, y) for x, y in line], steps=steps)
        parts.append(f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        if len(line) <= 20:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.5" fill="{colour}"/>' for x, y in (place(*p) for p in line)
            ]
        y = _TOP + 14 * index + 6
        parts.append(f'<rect x="{WIDTH - _RIGHT + 10}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - _RIGHT + 25}" y="{y + 1}">{escape(name)}</text>')
    return _svg(parts, HEIGHT)


def cdf(values: Sequence[float]) -> list[tuple[float, float]]:
    """Share of the values that are at most x, thinned to what a plot shows."""
    ordered = sorted(values)
    count = len(ordered)
    step = max(count // 400, 1)
    return [(ordered[i], (i + 1) / count) for i in range(0, count, step)] + ([(ordered[-1], 1.0)] if ordered else [])


def gantt(rows: Sequence[tuple[str, Sequence[tuple[float, float, str, str]]]], x_label: str, end: float) -> str:
    """Bars by row: (begin, end, class, tip) each; classes are coloured in the order in which they appear."""
    if not rows or end <= 0:
        return "<p>nothing to show</p>"
    height = _TOP + 15 * len(rows) + _BOTTOM
    names: dict[str, str] = {}
    parts = []
    scale = (WIDTH - 2 * _LEFT - _RIGHT) / end
    left = 2 * _LEFT
    for value in _ticks(0.0, end):
        x = left + value * scale
        parts.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{height - _BOTTOM}"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - _BOTTOM + 16}" text-anchor="middle">{value:g}</text>')
    for index, (label, bars) in enumerate(rows):
        y = _TOP + 15 * index
        parts.append(f'<text x="{left - 6}" y="{y + 10}" text-anchor="end">{escape(label)}</text>')
        for begin, finish, kind, tip in bars:
            colour = names.setdefault(kind, COLOURS[len(names) % len(COLOURS)])
            width = max((finish - begin) * scale, 0.6)
            parts.append(
                f'<rect x="{left + begin * scale:.1f}" y="{y + 1}" width="{width:.1f}" height="12" fill="{colour}">'
                f"<title>{escape(tip)}</title></rect>"
            )
    for index, (name, colour) in enumerate(list(names.items())[: len(rows) + 2]):
        y = _TOP + 14 * index + 6
        parts.append(f'<rect x="{WIDTH - _RIGHT + 10}" y="{y - 8}" width="10" height="10" fill="{colour}"/>')
        parts.append(f'<text x="{WIDTH - _RIGHT + 25}" y="{y + 1}">{escape(name)}</text>')
    parts.append(f'<text x="{WIDTH / 2}" y="{height - 6}" text-anchor="middle">{escape(x_label)}</text>')
    return _svg(parts, height)


def _axes(x_label: str, y_label: str) -> str:
    right, low = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    return (
        f'<path d="M{_LEFT} {_TOP}V{low}H{right}" fill="none" stroke="#444"/>'
        f'<text x="{(_LEFT + right) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{escape(x_label)}</text>'
        f'<text transform="translate(14 {(_TOP + low) / 2}) rotate(-90)" text-anchor="middle">{escape(y_label)}</text>'
    )


def _path(points: Sequence[tuple[float, float]], *, steps: bool) -> str:
    if not points:
        return ""
    text = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
    for x, y in points[1:]:
        text += f"H{x:.1f}V{y:.1f}" if steps else f"L{x:.1f} {y:.1f}"
    return text


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, five or so."""
    if high <= low:
        return [low]
    raw = (high - low) / 5
    base = 10 ** math.floor(math.log10(raw))
    step = next(base * factor for factor in (1, 2, 5, 10) if base * factor >= raw)
    first = math.ceil(low / step)
    return [round(k * step, 10) for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:g}" role="img">{"".join(parts)}</svg>'
