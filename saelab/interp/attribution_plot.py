"""Attributions as pictures: features by tokens (heat map), a graph over layers, and curves of what features recover."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Any

import torch

from saelab.interp.attribution import Attribution
from saelab.interp.attribution_graph import METRIC, AttributionGraph, GraphNode
from saelab.interp.faithfulness import CurvePoint, Curves
from saelab.interp.heat_map import Picture, heat_map, svg
from saelab.interp.picture_page import Page
from saelab.stats import Interval

#: Told apart by colour-blind eyes as well (Okabe and Ito).
_CHOICES = {"attribution": "#0072b2", "largest": "#e69f00", "random": "#777777"}
_FOR, _AGAINST, _INK = "#0072b2", "#d55e00", "#1c2430"
_PANEL, _HEIGHT, _LEFT, _TOP, _BOTTOM = 330, 270, 46, 30, 42

Place = Callable[[float], float]


# --- one layer


def attribution_page(found: Attribution, *, metric: str, n: int = 20) -> Page:
    """The ``n`` features of largest attribution, each with its tokens, and the error below them."""
    picture = feature_map(found, metric=metric, n=n)
    return Page(
        verb="attribute",
        title=f"Attribution at {found.hook_name}",
        sentences=(
            f"{metric}: {found.clean_value:.4g} on the text, {found.baseline_value:.4g} with the baseline's "
            f"activations at {found.hook_name}. The attributions add up to the difference but for {found.gap:+.3g}.",
        ),
        pictures=(svg(picture),),
        picture=picture,
        numbers=attribution_json(found, metric=metric, n=n),
    )


def feature_map(found: Attribution, *, metric: str, n: int) -> Picture:
    """Rows: the features whose largest attribution at a token is largest, and the error. Columns: tokens but BOS."""
    chosen = list(dict.fromkeys(part.feature for part in found.top(50 * n, errors=False)))[:n]
    rows = [found.features[:, feature] for feature in chosen] + [found.error]
    return heat_map(
        torch.stack(rows)[:, 1:].detach().cpu(),
        rows=[*(str(feature) for feature in chosen), "error"],
        columns=[f"{i}: {token}" for i, token in enumerate(found.tokens)][1:],
        title=f"Features of {found.hook_name} that move the metric",
        unit=metric,
        down="feature",
    )


def attribution_json(found: Attribution, *, metric: str, n: int) -> dict[str, Any]:
    """The ``n`` largest parts, and the sums of which they are a part."""
    return {
        "metric": metric,
        "hook_name": found.hook_name,
        "tokens": list(found.tokens),
        "clean_value": found.clean_value,
        "baseline_value": found.baseline_value,
        "effect": found.effect,
        "gap": found.gap,
        "error_attribution": float(found.error.sum()),
        "per_token": found.per_token().tolist(),
        "parts": [part._asdict() | {"token": found.tokens[part.position]} for part in found.top(n)],
    }


# --- several layers


def graph_page(graph: AttributionGraph, *, metric: str) -> Page:
    last = graph.layers[-1]
    return Page(
        verb="attribute",
        title="Attribution graph",
        sentences=(
            f"{metric}: {last.clean_value:.4g} on the text, {last.baseline_value:.4g} with the baseline's activations "
            f"at {last.hook_name}. Columns are tokens, rows are layers, the last below the metric; blue moves the "
            "metric up, orange down, and a line is as thick as its edge is strong.",
        ),
        pictures=(graph_svg(graph, metric=metric),),
        picture=None,
        numbers={"metric": metric, **graph.as_json()},
    )


def graph_svg(graph: AttributionGraph, *, metric: str) -> str:
    """Layers from bottom to top, tokens from left to right, the metric above them all."""
    hooks = [layer.hook_name for layer in graph.layers]
    slots = {
        position: max(sum(n.part.position == position and n.hook_name == h for n in graph.nodes) for h in hooks)
        for position in range(len(graph.tokens))
    }
    gap, box, row = 10, 62, 96
    starts: dict[int, float] = {}
    right = 150.0
    for position in range(1, len(graph.tokens)):
        starts[position] = right
        right += max(1, slots[position]) * box + gap
    height = 70 + row * len(hooks) + 40
    places: dict[str, tuple[float, float]] = {METRIC: (right / 2, 28.0)}
    taken: dict[tuple[str, int], int] = {}
    for node in graph.nodes:
        key = node.hook_name, node.part.position
        column = taken.get(key, 0)
        taken[key] = column + 1
        y = 70 + row * (len(hooks) - 1 - hooks.index(node.hook_name)) + row / 2
        places[node.name] = (starts[node.part.position] + column * box + box / 2, y)
    strongest = max((abs(edge.weight) for edge in graph.edges), default=1.0)
    parts = []
    for edge in reversed(graph.edges):  # the strongest on top
        (x1, y1), (x2, y2) = places[edge.source], places[edge.target]
        share = abs(edge.weight) / strongest
        parts.append(
            f'<line x1="{x1:.1f}" y1="{y1 - 11:.1f}" x2="{x2:.1f}" y2="{y2 + 11:.1f}" stroke="{_colour(edge.weight)}" '
            f'stroke-width="{0.5 + 4 * share:.2f}" stroke-opacity="{0.25 + 0.6 * share:.2f}">'
            f"<title>{_text(edge.source)} to {_text(edge.target)}: {edge.weight:+.3g}</title></line>"
        )
    parts += [_node(node, *places[node.name], token=graph.tokens[node.part.position]) for node in graph.nodes]
    parts.append(_word(*places[METRIC], metric, size=13))
    for number, hook in enumerate(hooks):
        parts.append(_word(8, 70 + row * (len(hooks) - 1 - number) + row / 2, hook, anchor="start", size=10))
    for position, start in starts.items():
        x = start + max(1, slots[position]) * box / 2
        parts.append(_word(x, height - 20, graph.tokens[position]))
    return _svg(right, height, "Attribution graph", parts)


def _node(node: GraphNode, x: float, y: float, *, token: str) -> str:
    label = "error" if node.part.feature is None else str(node.part.feature)
    hint = f"{node.name} at {token!r}: activation {node.part.act:.3g}, attribution {node.part.attribution:+.3g}"
    return (
        f'<g><rect x="{x - 27:.1f}" y="{y - 11:.1f}" width="54" height="22" rx="4" fill="white" '
        f'stroke="{_colour(node.part.attribution)}" stroke-width="1.5"/>{_word(x, y, label, size=11)}'
        f"<title>{_text(hint)}</title></g>"
    )


# --- curves


def curves_page(curves: Curves, *, metric: str) -> Page:
    shares = " and ".join(f"{i.value:.2f} ({i.low:.2f} to {i.high:.2f})" for i in curves.all_features)
    return Page(
        verb="attribute",
        title="What the features recover",
        sentences=(
            f"Shares of the effect on the {metric} over {curves.n_texts} texts, with 95 % bootstrap intervals over "
            f"texts. All features together, without the error, recover {shares} when put in and when taken out.",
        ),
        pictures=(curves_svg(curves),),
        picture=None,
        numbers=curves_json(curves, metric=metric),
    )


def curves_json(curves: Curves, *, metric: str) -> dict[str, Any]:
    def points(kind: Sequence[CurvePoint]) -> list[dict[str, Any]]:
        return [
            {name: value._asdict() if isinstance(value, Interval) else value for name, value in p._asdict().items()}
            for p in kind
        ]

    return {
        "metric": metric,
        "n_texts": curves.n_texts,
        "faithfulness": points(curves.faithfulness),
        "completeness": points(curves.completeness),
        "all_features": [interval._asdict() for interval in curves.all_features],
    }


def curves_svg(curves: Curves) -> str:
    """Faithfulness left, completeness right; the number of features doubles from tick to tick."""
    both = (("put into the baseline", curves.faithfulness), ("taken out of the text", curves.completeness))
    intervals = [getattr(p, choice) for _, points in both for p in points for choice in _CHOICES]
    low, high = min(0.0, *(i.low for i in intervals)), max(1.0, *(i.high for i in intervals))

    def y(value: float) -> float:
        return _TOP + (high - value) / (high - low) * (_HEIGHT - _TOP - _BOTTOM)

    parts = []
    for number, (title, points) in enumerate(both):
        start = number * (_PANEL + 20) + _LEFT
        step = (_PANEL - _LEFT) / max(1, len(points))
        at = [start + (i + 0.5) * step for i in range(len(points))]
        for level in (0.0, 1.0):
            parts.append(
                f'<line x1="{start}" x2="{start + _PANEL - _LEFT}" y1="{y(level):.1f}" y2="{y(level):.1f}" '
                'stroke="#bbbbbb"/>'
            )
            parts.append(_word(start - 6, y(level), f"{level:g}", anchor="end", size=11))
        parts.append(_word(start + (_PANEL - _LEFT) / 2, 14, title, size=13))
        for x, point in zip(at, points, strict=True):
            parts.append(_word(x, _HEIGHT - _BOTTOM + 14, str(point.n_features), size=11))
        parts.append(_word(start + (_PANEL - _LEFT) / 2, _HEIGHT - 10, "features", size=11))
        for shift, (choice, colour) in zip((0, 4, -4), _CHOICES.items(), strict=True):
            chosen = [getattr(point, choice) for point in points]
            parts += _curve([x + shift for x in at], chosen, y, choice=choice, colour=colour)
    for number, (choice, colour) in enumerate(_CHOICES.items()):
        x, level = 2 * (_PANEL + 20) + 20, _TOP + 18 * number
        parts.append(f'<circle cx="{x}" cy="{level}" r="4" fill="{colour}"/>')
        parts.append(_word(x + 10, level, choice, anchor="start"))
    return _svg(2 * (_PANEL + 20) + 120, _HEIGHT, "Share of the effect recovered", parts)


def _curve(at: Sequence[float], intervals: Sequence[Interval], y: Place, *, choice: str, colour: str) -> list[str]:
    route = " ".join(f"{x:.1f},{y(i.value):.1f}" for x, i in zip(at, intervals, strict=True))
    dash = ' stroke-dasharray="4 3"' if choice == "random" else ""
    parts = [f'<polyline fill="none" stroke="{colour}" stroke-width="1.6"{dash} points="{route}"/>']
    for x, i in zip(at, intervals, strict=True):
        parts.append(
            f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{y(i.low):.1f}" y2="{y(i.high):.1f}" stroke="{colour}"/>'
            f'<circle cx="{x:.1f}" cy="{y(i.value):.1f}" r="3.5" fill="{colour}">'
            f"<title>{choice}: {i.value:.3f} ({i.low:.3f} to {i.high:.3f})</title></circle>"
        )
    return parts


# --- SVG and HTML


def _colour(value: float) -> str:
    return _FOR if value >= 0 else _AGAINST


def _word(x: float | int, y: float | int, text: str, *, anchor: str = "middle", size: int = 12) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" dominant-baseline="central" '
        f'style="font: {size}px system-ui, sans-serif; fill: {_INK}; white-space: pre; unicode-bidi: isolate">'
        f"{_text(text)}</text>"
    )


def _svg(width: float | int, height: float | int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
        f'height="{height:.0f}" role="img" aria-label="{_text(title)}">'
        f'<rect width="{width:.0f}" height="{height:.0f}" fill="white"/>{"".join(parts)}</svg>\n'
    )


def _text(text: str) -> str:
    """Escaped for XML, which cannot hold control characters at all."""
    return escape("".join(letter if letter >= " " else "\ufffd" for letter in text))
