"""Pictures of lines: metrics of several trainings, a density that preferences move, and over-optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import saelab as sl
from saelab_explorer import vega
from saelab_explorer.theme import Palette
from saelab_explorer.vega import Spec

#: Dash patterns that go with ``Palette.series``, so that curves differ without their colours.
DASHES = ([1, 0], [7, 3], [2, 2], [9, 3, 2, 3], [4, 2], [12, 4])

Points = Sequence[tuple[float, float]]


class Line(NamedTuple):
    """One curve of a picture that holds several."""

    name: str
    points: Points


def compared(lines: Sequence[Line], title: str, clock: str, palette: Palette) -> Spec | None:
    """One metric of several trainings over their tokens or steps; None where none of them has two points.

    The first steps of a training often fall so far that nothing else would be seen: they are cut off at the top.
    """
    drawn = [(i, line) for i, line in enumerate(lines) if len(line.points) > 1]
    if not drawn:
        return None
    values: list[dict[str, Any]] = [
        {"x": x, "y": y, "line": line.name, "n": str(i)} for i, line in drawn for x, y in line.points
    ]
    settled = [y for _, line in drawn for _, y in line.points[len(line.points) // 50 :]]
    low, high = min(settled), max(settled)
    low = 0.0 if 0 <= low < high / 2 or low == high >= 0 else low
    room = (high - low) * 0.05 or abs(high) * 0.05 or 1.0
    order = [str(i) for i in range(len(palette.series))]
    x = vega.field("x", [min(v["x"] for v in values), max(v["x"] for v in values)])
    y = vega.field("y", [low if low == 0 else low - room, high + room])
    ways: Spec = {
        "x": x | vega.axis(palette, clock, format="~s", grid=False, ticks=4),
        "y": y | vega.axis(palette, None, format="~g", ticks=4),
        "color": {"field": "n", "type": "nominal", "legend": None, "scale": {"domain": order, "range": palette.series}},
    }
    dashes = {"field": "n", "type": "nominal", "legend": None, "scale": {"domain": order, "range": DASHES}}
    told = [vega.told("line", None, "training"), vega.told("x", ",", clock), vega.told("y", ".4g", title)]
    return vega.framed(190, values) | {
        "title": vega.title(title, palette),
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.8, "clip": True},
                "encoding": {**ways, "strokeDash": dashes},
            },
            {  # a line answers the mouse at its first point only
                "mark": {"type": "circle", "size": 60, "opacity": 0, "clip": True},
                "encoding": {**ways, "tooltip": told},
            },
        ],
    }


def frontier(members: Sequence[Mapping[str, Any]], palette: Palette) -> Spec | None:
    """Members of a sweep: reconstruction error against active features, the lower left corner is best."""
    values: list[dict[str, Any]] = [
        {"name": m["name"], "arch": m.get("arch", ""), "l0": m["l0"], "error": m["reconstruction"]}
        for m in members
        if _positive(m.get("l0")) and _positive(m.get("reconstruction"))
    ]
    if len(values) < 2:
        return None
    kinds = sorted({v["arch"] for v in values})
    across = [min(v["l0"] for v in values) * 0.85, max(v["l0"] for v in values) * 1.6]
    errors = [v["error"] for v in values]
    room = (max(errors) - min(errors)) * 0.12 or 0.05
    shapes = ["circle", "square", "triangle-up", "diamond", "cross", "triangle-down"]
    n = len(palette.series)
    ways: Spec = {
        "x": vega.field("l0", across, log=True)
        | vega.axis(palette, "active features per token (L0)", values=vega.ones_twos_fives(*across), format="~g"),
        "y": vega.field("error", [min(errors) - room, max(errors) + room])
        | vega.axis(palette, "reconstruction error", format=".2f", ticks=4),
    }
    kind = {"field": "arch", "type": "nominal", "legend": None}
    colours = {"domain": kinds, "range": [palette.series[i % n] for i in range(len(kinds))]}
    forms = {"domain": kinds, "range": [shapes[i % n] for i in range(len(kinds))]}
    told = [vega.told("name"), vega.told("l0", ".2f", "L0"), vega.told("error", ".4f", "reconstruction error")]
    return vega.framed(280, values) | {
        "layer": [
            {
                "mark": {"type": "point", "filled": True, "size": 80, "opacity": 0.9},
                "encoding": {**ways, "color": {**kind, "scale": colours}, "shape": {**kind, "scale": forms},
                             "tooltip": told},
            },
            {
                "mark": {"type": "text", "align": "left", "dx": 9, "fontSize": 11, "color": palette.muted},
                "encoding": {**ways, "text": {"field": "name", "type": "nominal"}},
            },
        ],
    }  # fmt: skip


def preference(landscape: sl.PreferredDensity, *, good: float, bad: float, palette: Palette) -> Spec:
    """The reference and the policy that preferences make of it, with the two places that were compared."""
    rows = zip(landscape.x.tolist(), landscape.reference.tolist(), landscape.policy.tolist(), strict=True)
    values: list[dict[str, Any]] = [
        {"x": round(x, 4), "reference": round(r, 6), "policy": round(p, 6)} for x, r, p in rows
    ]
    top = max(max(v["reference"], v["policy"]) for v in values)
    x = vega.field("x", [values[0]["x"], values[-1]["x"]]) | vega.axis(palette, "answer", grid=False, ticks=7)

    def density(name: str, colour: str) -> Spec:
        y = vega.field(name, [0, top * 1.18]) | vega.axis(palette, "density", format="~g", ticks=4)
        told = [vega.told("x", ".2f", "answer"), vega.told("reference", ".3f"), vega.told("policy", ".3f")]
        mark = {"type": "area", "line": {"color": colour, "strokeWidth": 2.2}, "color": colour, "opacity": 0.16}
        return {"mark": mark, "encoding": {"x": x, "y": y, "tooltip": told}}

    def label(name: str, colour: str, **place: int | str) -> Spec:
        peak = max(values, key=lambda v: v[name])
        mark = {"type": "text", "color": colour, "fontWeight": 600, "fontSize": 12, **place}
        y = vega.field(name, [0, top * 1.18])
        return {"data": {"values": [peak | {"word": name}]}, "mark": mark,
                "encoding": {"x": x, "y": y, "text": {"field": "word", "type": "nominal"}}}  # fmt: skip

    places = [{"x": good, "word": "chosen"}, {"x": bad, "word": "rejected"}]
    marked: list[Spec] = [
        {"data": {"values": places}, "mark": {"type": "rule", "color": palette.muted, "strokeDash": [3, 3]},
         "encoding": {"x": x}},
        {"data": {"values": places},
         "mark": {"type": "text", "color": palette.muted, "fontSize": 11, "align": "left", "dx": 4, "y": 8},
         "encoding": {"x": x, "text": {"field": "word", "type": "nominal"}}},
    ]  # fmt: skip
    lines = [density("reference", palette.baseline), density("policy", palette.steered)]
    names = [label("reference", palette.baseline, dy=-9), label("policy", palette.steered, align="left", dx=9)]
    return vega.framed(330, values) | {"layer": [*marked, *lines, *names]}


def overoptimisation(seeds: Sequence[sl.Overoptimisation], beta: float, palette: Palette) -> Spec:
    """What optimising a proxy does to itself and to what it stands for; the first seed bold, the others thin.

    Rewards are gains over the reference, so that both begin at 0: the proxy in its own standard deviations there, the
    gold reward in its own units. The first policy of each seed is the reference.
    """
    values: list[dict[str, Any]] = [
        {"seed": str(s), "d": round(p.distance, 4), "proxy": round(p.proxy - start.proxy, 4), "beta": p.setting,
         "gold": round(p.gold - start.gold, 4)}
        for s, curve in enumerate(seeds)
        for start in curve.exact.points[:1]
        for p in curve.exact.points
    ]  # fmt: skip
    heights = [v[name] for v in values for name in ("proxy", "gold")]
    room = (max(heights) - min(heights)) * 0.06 or 1.0
    domain = [min(heights) - room, max(heights) + room]
    right = max(v["d"] for v in values) * 1.17
    first = [v for v in values if v["seed"] == "0"]
    now = min(first[1:], key=lambda v: abs(v["beta"] - beta))
    x = vega.field("d", [0, right]) | vega.axis(palette, "distance from the reference, √KL (√nats)", ticks=5)

    def of(name: str) -> Spec:
        return vega.field(name, domain) | vega.axis(palette, "gain in reward", format="~g", ticks=5)

    def curves(name: str, colour: str, dash: list[int]) -> list[Spec]:
        mark = {"type": "line", "color": colour, "strokeDash": dash, "clip": True, "interpolate": "monotone"}
        series = {"field": "seed", "type": "nominal"}
        end = first[-1] | {"word": name}
        told = [vega.told("beta"), vega.told("d", ".2f", "√KL"), vega.told("proxy", ".2f"), vega.told("gold", ".2f")]
        return [
            {"mark": mark | {"strokeWidth": 1, "opacity": 0.3}, "encoding": {"x": x, "y": of(name), "detail": series}},
            {"data": {"values": first}, "mark": mark | {"strokeWidth": 2.4}, "encoding": {"x": x, "y": of(name)}},
            {"data": {"values": [now]}, "mark": {"type": "circle", "size": 110, "color": colour, "opacity": 1},
             "encoding": {"x": x, "y": of(name), "tooltip": told}},
            {"data": {"values": [end]},
             "mark": {"type": "text", "color": colour, "fontWeight": 600, "fontSize": 12, "dx": 8, "align": "left"},
             "encoding": {"x": x, "y": of(name), "text": {"field": "word", "type": "nominal"}}},
        ]  # fmt: skip

    zero = {"data": {"values": [{"zero": 0}]}, "mark": {"type": "rule", "color": palette.line_strong},
            "encoding": {"y": vega.field("zero", domain)}}  # fmt: skip
    layers = [zero, *curves("proxy", palette.muted, [6, 4]), *curves("gold", palette.steered, [1, 0])]
    return vega.framed(330, values) | {"layer": layers}


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
