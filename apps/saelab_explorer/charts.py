"""Vega-Lite pictures as plain dictionaries: building Altair objects for the same pictures takes seven times longer.

Every scale has its domain written out. The browser draws a picture before its data arrive, and would complain that it
cannot find the extent of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from saelab_explorer.figures import percent
from saelab_explorer.theme import Palette

Spec = dict[str, Any]

#: Name of the selection that a click on a dot makes.
SELECTION = "feature"


def histogram(edges: Sequence[float], counts: Sequence[int], palette: Palette) -> Spec:
    """Firings by activation. Both axes are logarithmic: the bins are of equal ratio, and the counts span decades.

    The lowest bin takes all that is below and begins at 0, which has no logarithm: it is drawn half an octave wide.
    """
    floor = 0.7  # a bar of one firing must have a height
    values: list[dict[str, Any]] = [
        {"from": low or high / math.sqrt(2), "to": high, "n": n, "floor": floor, "range": f"{low:.3g} to {high:.3g}"}
        for (low, high), n in zip(pairwise(edges), counts, strict=True)
        if n
    ]
    most = max(max(counts), 2)
    domain = [values[0]["from"] if values else edges[-1] / 2, edges[-1]]
    return _framed(165, values, palette) | {
        "mark": {"type": "bar", "color": palette.bar, "binSpacing": 0.6},
        "encoding": {
            "x": _binned(domain, log=True)
            | _axis(palette, "activation", grid=False, values=_ones_twos_fives(*domain), format="~g"),
            "x2": {"field": "to"},
            "y": _field("n", [floor, most * 1.15], log=True)
            | _axis(palette, "tokens", values=_decades(1, most), format="~s"),
            "y2": {"field": "floor"},
            "tooltip": [_told("range", None, "activation"), _told("n", ",", "tokens")],
        },
    }


def densities(density: np.ndarray, palette: Palette, *, n_bins: int = 48) -> Spec | None:
    """How many features fire how often; silent ones have no logarithm and are told beside the picture."""
    logs = np.log10(density[density > 0])
    if not len(logs):
        return None
    counts, edges = np.histogram(logs, bins=n_bins)
    values = [
        {"from": float(low), "to": float(high), "n": int(n), "range": f"{percent(10**low)} to {percent(10**high)}"}
        for (low, high), n in zip(pairwise(edges), counts, strict=True)
        if n
    ]
    domain = [float(edges[0]), float(edges[-1])]
    whole = list(range(math.ceil(domain[0]), math.floor(domain[1]) + 1))
    return _framed(230, values, palette) | {
        "mark": {"type": "bar", "color": palette.bar, "binSpacing": 0.6},
        "encoding": {
            "x": _binned(domain)
            | _axis(
                palette,
                "share of tokens it fires on",
                grid=False,
                values=whole,
                label=f"{_PERCENT.format('datum.value')}",
            ),
            "x2": {"field": "to"},
            "y": _field("n", [0, float(counts.max()) * 1.05]) | _axis(palette, "features", ticks=4),
            "tooltip": [_told("n", ",", "features"), _told("range", None, "fire on")],
        },
    }


def density_by_max(density: np.ndarray, max_act: np.ndarray, labels: Sequence[str], palette: Palette) -> Spec | None:
    """One dot a feature, density against maximum; a click selects the feature."""
    alive = np.flatnonzero((density > 0) & (max_act > 0))
    if not len(alive):
        return None
    values = [
        {
            "feature": int(i),
            "density": float(f"{density[i]:.3g}"),
            "max": float(f"{max_act[i]:.3g}"),
            "label": labels[int(i)],
            "share": percent(float(density[i])),
        }
        for i in alive
    ]
    across, up = _roomy(density[alive]), _roomy(max_act[alive])
    return _framed(310, values, palette) | {
        "params": [{"name": SELECTION, "select": {"type": "point", "fields": ["feature"], "on": "click"}}],
        "mark": {"type": "circle", "size": 22, "color": palette.bar, "opacity": 0.5, "cursor": "pointer"},
        "encoding": {
            "x": _field("density", across, log=True)
            | _axis(
                palette,
                "share of tokens it fires on",
                values=_decades(*across),
                label=_PERCENT.format("log(datum.value) / log(10)"),
            ),
            "y": _field("max", up, log=True)
            | _axis(palette, "largest activation", values=_ones_twos_fives(*up), format="~g"),
            "tooltip": [_told("feature"), _told("label"), _told("share", None, "fires on"), _told("max", ".2f")],
        },
    }


def selected_feature(selection: object) -> int | None:
    """The feature of a click on ``density_by_max``, as the browser sends it."""
    points = selection.get(SELECTION) if isinstance(selection, dict) else None
    first = points[0] if isinstance(points, list) and points else None
    feature = first.get("feature") if isinstance(first, dict) else None
    return feature if type(feature) is int else None


def curve(
    lines: Sequence[dict[str, Any]], name: str, title: str, palette: Palette, *, format: str = "~g"
) -> Spec | None:
    """One training metric over tokens; None where the log does not hold it. A curve of 300 pixels needs few points."""
    points = [
        {"tokens": line["tokens"], "value": line[name]} for line in lines if isinstance(line.get(name), (int, float))
    ]
    if len(points) < 2:
        return None
    stride = -(-len(points) // 240)
    kept = points[::stride] + ([points[-1]] if (len(points) - 1) % stride else [])
    values = [point["value"] for point in kept]
    # the first steps of a training fall so far that nothing else would be seen; they are cut off at the top
    top = max(values[len(values) // 50 :]) or 1.0
    return _framed(150, kept, palette) | {
        "title": {
            "text": title,
            "anchor": "start",
            "fontSize": 12,
            "fontWeight": 600,
            "color": palette.muted,
            "offset": 6,
        },
        "mark": {"type": "line", "color": palette.bar, "strokeWidth": 1.8, "clip": True},
        "encoding": {
            "x": _field("tokens", [kept[0]["tokens"], kept[-1]["tokens"]])
            | _axis(palette, None, format="~s", grid=False, ticks=4),
            "y": _field("value", [0, top * 1.05]) | _axis(palette, None, format=format, ticks=3),
            "tooltip": [_told("tokens", ","), _told("value", ".4g", title)],
        },
    }


#: Vega expression that writes 10 to the given power as a percentage.
_PERCENT = "format(pow(10, round({}) + 2), '~r') + ' %'"


def _framed(height: int, values: list[dict[str, Any]], palette: Palette) -> Spec:
    return {
        "height": height,
        "background": "transparent",
        "data": {"values": values},
        "config": {"view": {"stroke": None}, "legend": {"disable": True}},
    }


def _field(name: str, domain: Sequence[float], *, log: bool = False) -> Spec:
    return {
        "field": name,
        "type": "quantitative",
        "scale": {"domain": list(domain), "nice": False} | ({"type": "log"} if log else {"zero": False}),
    }


def _binned(domain: Sequence[float], *, log: bool = False) -> Spec:
    return _field("from", domain, log=log) | {"bin": {"binned": True}}


def _axis(
    palette: Palette,
    title: str | None,
    *,
    format: str | None = None,
    grid: bool = True,
    ticks: int = 5,
    values: Sequence[float] | None = None,
    label: str | None = None,
) -> Spec:
    axis = {
        "title": title,
        "titleFontWeight": 400,
        "titleFontSize": 11,
        "titleColor": palette.muted,
        "titlePadding": 8,
        "labelFontSize": 11,
        "labelColor": palette.muted,
        "tickCount": ticks,
        "tickColor": palette.line_strong,
        "grid": grid,
        "gridColor": palette.line,
        "domain": False,
    }
    given = {"format": format, "values": values, "labelExpr": label}
    return {"axis": axis | {name: value for name, value in given.items() if value is not None}}


def _told(field: str, format: str | None = None, title: str | None = None) -> Spec:
    """A line of a tooltip."""
    return {"field": field, "title": title or field} | ({"format": format} if format else {})


def _roomy(values: np.ndarray) -> list[float]:
    """A logarithmic domain with some room at both ends."""
    return [float(values.min()) * 0.8, float(values.max()) * 1.25]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``."""
    return [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def _ones_twos_fives(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        value for power in powers for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= value <= high
    ]
