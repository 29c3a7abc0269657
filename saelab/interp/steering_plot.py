"""Dose curves as a picture that needs no library: effect against next-token KL, and against perplexity."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from html import escape

from saelab.interp.steering_report import Point

_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM, _GAP = 320, 250, 44, 12, 40, 40

#: Told apart by colour-blind eyes as well (Okabe and Ito); dashes for what has no meaning.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#999999", "#666666", "#cc79a7", "#e69f00", "#56b4e9")


def dose_plot(points: Sequence[Point], *, unsteered_perplexity: float) -> str:
    """Two panels with a line for each method, its interval as a bar at each dose, and a legend, as SVG.

    Left against KL, from nothing at 0; right against the perplexity of the written text on a logarithmic axis, from the
    unsteered text's.
    """
    methods = list(dict.fromkeys(point.method for point in points))
    low = min(0.0, *(p.effect.low for p in points))
    high = max(*(p.effect.high for p in points), low + 1e-6)

    def y(effect: float) -> float:
        return _TOP + (high - effect) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    most = max(p.kl for p in points)
    perplexities = [unsteered_perplexity, *(p.perplexity.value for p in points)]
    least, largest = math.log(min(perplexities)), math.log(max(perplexities) * 1.01)

    def x_kl(point: Point | None) -> float:
        return _LEFT + (point.kl if point else 0.0) / most * (_PANEL - _LEFT)

    def x_perplexity(point: Point | None) -> float:
        value = math.log(point.perplexity.value if point else unsteered_perplexity)
        return _PANEL + _GAP + _LEFT + (value - least) / (largest - least) * (_PANEL - _LEFT)

    parts = []
    for start, x, low_tick, high_tick, title in (
        (_LEFT, x_kl, "0", f"{most:.2g}", "next-token KL, nats"),
        (
            _PANEL + _GAP + _LEFT,
            x_perplexity,
            f"{math.exp(least):.3g}",
            f"{math.exp(largest):.3g}",
            "perplexity of the text",
        ),
    ):
        parts += _axes(start, y, (low, high), (low_tick, high_tick), title)
        for method, colour in zip(methods, _cycled(len(methods)), strict=True):
            parts += _series([p for p in points if p.method == method], x, y, colour)
    for row, (method, colour) in enumerate(zip(methods, _cycled(len(methods)), strict=True)):
        top = _TOP + 12 + 18 * row
        left = 2 * _PANEL + _GAP + 20
        parts.append(f'<circle cx="{left}" cy="{top - 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{left + 10}" y="{top}">{escape(method)}</text>')
    width = 2 * _PANEL + _GAP + 190
    title = "<title>Effect of steering in nats, against its cost</title>"
    return f'<svg viewBox="0 0 {width} {_HEIGHT}" role="img">{title}{"".join(parts)}</svg>'


def _series(
    points: Sequence[Point], x: Callable[[Point | None], float], y: Callable[[float], float], colour: str
) -> list[str]:
    if points[0].strength is None:
        path = []  # an instruction is a point of its own: there is nothing between it and no instruction
    else:
        corners = [(x(None), y(0.0)), *((x(p), y(p.effect.value)) for p in points)]
        dash = ' stroke-dasharray="4 3"' if points[0].method.startswith("random") else ""
        route = " ".join(f"{a:.1f},{b:.1f}" for a, b in corners)
        path = [f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dash} points="{route}"/>']
    for p in points:
        path.append(
            f'<line x1="{x(p):.1f}" x2="{x(p):.1f}" y1="{y(p.effect.low):.1f}" y2="{y(p.effect.high):.1f}" '
            f'stroke="{colour}" stroke-opacity="0.5"/>'
        )
        path.append(
            f'<circle cx="{x(p):.1f}" cy="{y(p.effect.value):.1f}" r="3.5" fill="{colour}"><title>{escape(p.method)}: '
            f"{p.effect.value:+.2f} nats ({p.effect.low:+.2f} to {p.effect.high:+.2f}) at a KL of {p.kl:.2f}, "
            f"perplexity {p.perplexity.value:.3g}</title></circle>"
        )
    return path


def _axes(
    start: int, y: Callable[[float], float], span: tuple[float, float], ticks: tuple[str, str], title: str
) -> list[str]:
    end, base = start + _PANEL - _LEFT, _HEIGHT - _BOTTOM
    marks = [
        f'<line class="axis" x1="{start}" y1="{y(0.0):.1f}" x2="{end}" y2="{y(0.0):.1f}"/>',
        f'<line class="axis" x1="{start}" y1="{_TOP}" x2="{start}" y2="{base}"/>',
        f'<text class="tick" x="{start}" y="{base + 16}">{ticks[0]}</text>',
        f'<text class="tick" x="{end}" y="{base + 16}" text-anchor="end">{ticks[1]}</text>',
        f'<text class="tick" x="{(start + end) / 2:.0f}" y="{base + 32}" text-anchor="middle">{title}</text>',
    ]
    for value in {0.0, *span}:
        marks.append(f'<text class="tick" x="{start - 6}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    return marks


def _cycled(n: int) -> list[str]:
    return [_COLOURS[i % len(_COLOURS)] for i in range(n)]
