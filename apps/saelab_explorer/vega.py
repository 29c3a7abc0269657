"""Pieces of Vega-Lite pictures, which are plain dictionaries: Altair objects for the same take seven times longer.

Every scale has its domain written out. The browser draws a picture before its data arrive, and would complain that it
cannot find the extent of nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from saelab_explorer.theme import Palette

Spec = dict[str, Any]

#: Vega expression that writes 10 to the given power as a percentage.
PERCENT = "format(pow(10, round({}) + 2), '~r') + ' %'"


def framed(height: int, values: list[dict[str, Any]]) -> Spec:
    """A picture without its mark and encoding."""
    return {
        "height": height,
        "background": "transparent",
        "data": {"values": values},
        "config": {"view": {"stroke": None}, "legend": {"disable": True}},
    }


def field(name: str, domain: Sequence[float], *, log: bool = False) -> Spec:
    """A channel of numbers with its domain written out."""
    return {
        "field": name,
        "type": "quantitative",
        "scale": {"domain": list(domain), "nice": False} | ({"type": "log"} if log else {"zero": False}),
    }


def binned(domain: Sequence[float], *, log: bool = False) -> Spec:
    return field("from", domain, log=log) | {"bin": {"binned": True}}


def axis(
    palette: Palette,
    title: str | None,
    *,
    format: str | None = None,
    grid: bool = True,
    ticks: int = 5,
    values: Sequence[float] | None = None,
    label: str | None = None,
) -> Spec:
    look = {
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
    return {"axis": look | {name: value for name, value in given.items() if value is not None}}


def title(text: str, palette: Palette) -> Spec:
    """The heading of a picture, in its upper left corner."""
    look = {"anchor": "start", "fontSize": 12, "fontWeight": 600, "offset": 6}
    return {"text": text, "color": palette.muted, **look}


def told(field: str, format: str | None = None, title: str | None = None) -> Spec:
    """A line of a tooltip."""
    return {"field": field, "title": title or field} | ({"format": format} if format else {})


def roomy(values: np.ndarray) -> list[float]:
    """A logarithmic domain with some room at both ends."""
    return [float(values.min()) * 0.8, float(values.max()) * 1.25]


def decades(low: float, high: float) -> list[float]:
    """Powers of ten from ``low`` to ``high``."""
    return [10.0**power for power in range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1)]


def ones_twos_fives(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [
        value for power in powers for value in (10.0**power, 2 * 10.0**power, 5 * 10.0**power) if low <= value <= high
    ]
