"""Gold and proxy reward against sqrt(KL), as a picture that needs no library."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from saelab.align.overopt import Curve, Overoptimisation

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 640, 360, 56, 44, 28, 150
_COLOURS = {"exact": "#0072b2", "best of n": "#d55e00", "PPO": "#009e73"}  # told apart by colour-blind eyes as well

#: From (sqrt(KL), reward) to "x,y" in the picture.
Place = Callable[[float, float], str]


def svg_of(result: Overoptimisation) -> str:
    """All curves: gold drawn through, proxy dashed, each peak marked."""
    curves = {"exact": result.exact, "best of n": result.best_of_n} | ({"PPO": result.ppo} if result.ppo else {})
    points = [point for curve in curves.values() for point in curve.points]
    right = max(point.distance for point in points) * 1.05
    values = [value for point in points for value in (point.gold, point.proxy)]
    low, high = min(values) - 0.3, max(values) + 0.3

    def place(x: float, y: float) -> str:
        across = _LEFT + x / right * (_WIDTH - _LEFT - _RIGHT)
        down = _TOP + (high - y) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)
        return f"{across:.1f},{down:.1f}"

    def line(pairs: Sequence[tuple[float, float]], style: str) -> str:
        return f'<polyline fill="none" {style} points="{" ".join(place(x, y) for x, y in pairs)}"/>'

    parts = [_frame(right, low, high, place)]
    for row, (name, curve) in enumerate(curves.items()):
        stroke = f'stroke="{_COLOURS[name]}" stroke-width="2"'
        parts.append(line([(p.distance, p.gold) for p in curve.points], stroke))
        parts.append(line([(p.distance, p.proxy) for p in curve.points], stroke + ' stroke-dasharray="5 4"'))
        parts.append(_peak(curve, place, _COLOURS[name]))
        y = _TOP + 18 * row + 12
        x = _WIDTH - _RIGHT + 12
        parts.append(f'<text x="{x}" y="{y}" fill="{_COLOURS[name]}" font-size="12">{name}: gold, proxy - -</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" role="img">'
        "<title>Gold and proxy reward against the square root of the KL from the reference</title>"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>' + "".join(parts) + "</svg>\n"
    )


def _frame(right: float, low: float, high: float, place: Place) -> str:
    x0, y0 = place(0.0, low).split(",")
    x1, y1 = place(right, high).split(",")
    marks = [f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#444"/>']
    for value in range(int(low), int(high) + 1, 2):
        _, y = place(0.0, float(value)).split(",")
        marks.append(f'<text x="{_LEFT - 8}" y="{float(y) + 4:.1f}" font-size="11" text-anchor="end">{value}</text>')
    for value in range(int(right) + 1):
        x, _ = place(float(value), low).split(",")
        marks.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" font-size="11" text-anchor="middle">{value}</text>')
    middle = _LEFT + (_WIDTH - _LEFT - _RIGHT) / 2
    marks.append(f'<text x="{middle}" y="{_HEIGHT - 8}" font-size="12" text-anchor="middle">sqrt(KL) in nats</text>')
    marks.append(f'<text x="{_LEFT}" y="{_TOP - 10}" font-size="12">reward</text>')
    return "".join(marks)


def _peak(curve: Curve, place: Place, colour: str) -> str:
    x, y = place(curve.peak.distance, curve.peak.gold).split(",")
    return f'<circle cx="{x}" cy="{y}" r="4" fill="{colour}"/>'
