"""AUROC by layer with both controls, as a picture that needs no library."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

_WIDTH, _HEIGHT, _LEFT, _BOTTOM, _TOP, _RIGHT = 720, 380, 56, 48, 28, 190
#: Told apart by colour-blind eyes as well, and on light and dark ground.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00")

#: From (position on the axis of layers, AUROC) to (x, y) in the picture.
Place = Callable[[float, float], tuple[float, float]]


def layer_sweep_svg(content: Mapping[str, Any]) -> str:
    """The probes of probe.json along the layers, in the order of the study: one line and band of intervals a method.

    Dashed in the same colour the mean of shuffled labels; grey the bag of words, which has no layer.
    """
    hooks = list(dict.fromkeys(probe["hook_name"] for probe in content["probes"]))
    methods = list(dict.fromkeys(probe["method"] for probe in content["probes"]))
    words = content["words"]["auroc"]
    lowest = min(probe[of]["auroc"]["low"] for probe in content["probes"] for of in ("figures", "shuffled"))
    low = max(0.0, min(0.45, lowest, words["low"]) - 0.02)
    last = float(max(len(hooks) - 1, 1))

    def place(at: float, auroc: float) -> tuple[float, float]:
        x = _LEFT + 12 + (_WIDTH - _LEFT - _RIGHT - 24) * at / last
        return x, _TOP + (1 - auroc) / (1 - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = [_frame(hooks, [probe["layer"] for probe in _first_of(content, hooks)], low, place)]
    grey = 'fill="none" stroke="#888" stroke-width="2"'
    parts.append(_band([(0.0, words), (last, words)], place, "#888"))
    parts.append(_line([(0.0, words["value"]), (last, words["value"])], place, grey))
    parts.append(_legend(0, "#888", "bag of words"))
    for i, method in enumerate(methods):
        colour = _COLOURS[i % len(_COLOURS)]
        found = [(float(hooks.index(p["hook_name"])), p) for p in content["probes"] if p["method"] == method]
        parts.append(_band([(at, p["figures"]["auroc"]) for at, p in found], place, colour))
        stroke = f'fill="none" stroke="{colour}" stroke-width="2"'
        parts.append(_line([(at, p["figures"]["auroc"]["value"]) for at, p in found], place, stroke))
        shuffled = [(at, p["shuffled"]["auroc"]["value"]) for at, p in found]
        parts.append(_line(shuffled, place, f'{stroke} stroke-dasharray="5 4"'))
        parts += [_mark(at, p, place, colour) for at, p in found]
        parts.append(_legend(i + 1, colour, method))
    parts.append(_legend(len(methods) + 1, "#888", "dashed: shuffled labels"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" role="img">'
        f"<title>AUROC of probes on {escape(content['data']['name'])} by layer</title>"
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _first_of(content: Mapping[str, Any], hooks: Sequence[str]) -> list[Mapping[str, Any]]:
    return [next(probe for probe in content["probes"] if probe["hook_name"] == hook) for hook in hooks]


def _frame(hooks: Sequence[str], layers: Sequence[int | None], low: float, place: Place) -> str:
    left, right = place(0.0, low)[0] - 12, place(float(max(len(hooks) - 1, 1)), low)[0] + 12
    bottom, top = place(0.0, low)[1], place(0.0, 1.0)[1]
    parts = [f'<path d="M{left:.1f} {top:.1f}V{bottom:.1f}H{right:.1f}" fill="none" stroke="#444"/>']
    for tenths in range(11):
        if tenths / 10 >= low:
            y = place(0.0, tenths / 10)[1]
            style = 'stroke="#444" stroke-dasharray="1 3"' if tenths == 5 else 'stroke="#ddd"'
            parts.append(f'<path d="M{left:.1f} {y:.1f}H{right:.1f}" {style}/>')
            parts.append(_text(left - 8, y + 4, f"{tenths / 10:.1f}", "end"))
    every = -(-len(hooks) // 16)
    for at, (hook, layer) in enumerate(zip(hooks, layers, strict=True)):
        if at % every == 0:
            parts.append(_text(place(float(at), low)[0], bottom + 16, hook if layer is None else str(layer), "middle"))
    parts.append(_text((left + right) / 2, _HEIGHT - 10.0, "layer", "middle"))
    parts.append(_text(left, _TOP - 10.0, "AUROC on test texts, 95 % intervals over groups", "start"))
    return "".join(parts)


def _band(points: Sequence[tuple[float, Mapping[str, float]]], place: Place, colour: str) -> str:
    around = [(at, p["low"]) for at, p in points] + [(at, p["high"]) for at, p in reversed(points)]
    return f'<polygon points="{_joined(around, place)}" fill="{colour}" fill-opacity="0.15"/>'


def _line(points: Sequence[tuple[float, float]], place: Place, style: str) -> str:
    return f'<polyline {style} points="{_joined(points, place)}"/>'


def _mark(at: float, probe: Mapping[str, Any], place: Place, colour: str) -> str:
    """A dot with its interval, so that a single layer shows as well."""
    own = probe["figures"]["auroc"]
    (x, low), (_, high), (_, y) = (place(at, own[part]) for part in ("low", "high", "value"))
    said = f"{probe['method']} at {probe['hook_name']}: {own['value']:.3f} ({own['low']:.3f} to {own['high']:.3f})"
    return (
        f'<path d="M{x:.1f} {low:.1f}V{high:.1f}" stroke="{colour}"/>'
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"><title>{escape(said)}</title></circle>'
    )


def _joined(points: Sequence[tuple[float, float]], place: Place) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in points))


def _legend(row: int, colour: str, text: str) -> str:
    x, y = _WIDTH - _RIGHT + 16, _TOP + 20 * row + 12
    box = f'<rect x="{x}" y="{y - 9}" width="10" height="10" fill="{colour}"/>'
    return box + _text(x + 16.0, float(y), text, "start")


def _text(x: float, y: float, text: str, anchor: str) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" font-size="12" fill="#222" text-anchor="{anchor}">{escape(text)}</text>'
