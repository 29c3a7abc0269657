"""The two pictures of a report, as SVG: intervals side by side, and a histogram. They need no script and no network."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple

from saelab.stats import Interval

_WIDTH, _LABEL, _ROW, _PAD = 760, 300, 26, 28


class Row(NamedTuple):
    """One line of an interval plot."""

    label: str
    interval: Interval
    control: Interval | None = None


def interval_plot(rows: Sequence[Row], *, unit: str) -> str:
    """A dot with its 95 % interval for each row, and a hollow one for its control; all on one axis."""
    everything = [i for row in rows for i in (row.interval, row.control) if i is not None]
    low = min(0.0, *(i.low for i in everything), *(i.value for i in everything))
    high = max(*(i.high for i in everything), *(i.value for i in everything), low + 1e-9)
    high += (high - low) * 0.03

    def x(value: float) -> float:
        return _LABEL + (_WIDTH - _LABEL - 20) * (value - low) / (high - low)

    height = len(rows) * _ROW + _PAD
    parts = [_line(x(0.0), 4.0, x(0.0), float(height - _PAD), "axis")]
    for i, row in enumerate(rows):
        y = i * _ROW + _ROW / 2 + 2
        parts.append(f'<text x="{_LABEL - 12}" y="{y + 4:.1f}" text-anchor="end">{escape(row.label)}</text>')
        if row.control is not None:
            parts += _mark(x, row.control, y + 5, "control")
            y -= 4
        parts += _mark(x, row.interval, y, "own")
    for value in (low, (low + high) / 2, high):
        parts.append(f'<text x="{x(value):.1f}" y="{height - 8}" text-anchor="middle" class="tick">{value:.3g}</text>')
    parts.append(f'<text x="{_LABEL - 12}" y="{height - 8}" text-anchor="end" class="tick">{escape(unit)}</text>')
    return _svg(height, parts)


def histogram(edges: Sequence[float], counts: Sequence[int], *, unit: str) -> str:
    """Bars of equal width over ``edges`` [n + 1]."""
    height, base = 160, 130
    top = max([*counts, 1])
    step = (_WIDTH - 40) / len(counts)
    parts = [
        f'<rect class="bar" x="{20 + i * step:.1f}" y="{base - 115 * count / top:.1f}" width="{step - 1:.1f}" '
        f'height="{115 * count / top:.1f}"><title>{edges[i]:.2f} to {edges[i + 1]:.2f}: {count:,}</title></rect>'
        for i, count in enumerate(counts)
    ]
    parts.append(_line(20.0, float(base), _WIDTH - 20.0, float(base), "axis"))
    for i in (0, len(counts) // 2, len(counts)):
        parts.append(
            f'<text x="{20 + i * step:.1f}" y="{base + 16}" text-anchor="middle" class="tick">{edges[i]:.3g}</text>'
        )
    parts.append(f'<text x="{_WIDTH / 4}" y="{base + 16}" text-anchor="middle" class="tick">{escape(unit)}</text>')
    return _svg(height, parts)


def _mark(x: Callable[[float], float], interval: Interval, y: float, kind: str) -> list[str]:
    return [
        _line(x(interval.low), y, x(interval.high), y, kind),
        f'<circle class="{kind}" cx="{x(interval.value):.1f}" cy="{y:.1f}" r="4"><title>{interval.value:.4g} '
        f"({interval.low:.4g} to {interval.high:.4g})</title></circle>",
    ]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'


def _svg(height: int, parts: Sequence[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height}" role="img">{"".join(parts)}</svg>'
