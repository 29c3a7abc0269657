"""The pictures of features and of one training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from saelab_explorer import vega
from saelab_explorer.figures import percent
from saelab_explorer.theme import Palette
from saelab_explorer.vega import Spec

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
    return vega.framed(165, values) | {
        "mark": {"type": "bar", "color": palette.bar, "binSpacing": 0.6},
        "encoding": {
            "x": vega.binned(domain, log=True)
            | vega.axis(palette, "activation", grid=False, values=vega.ones_twos_fives(*domain), format="~g"),
            "x2": {"field": "to"},
            "y": vega.field("n", [floor, most * 1.15], log=True)
            | vega.axis(palette, "tokens", values=vega.decades(1, most), format="~s"),
            "y2": {"field": "floor"},
            "tooltip": [vega.told("range", None, "activation"), vega.told("n", ",", "tokens")],
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
    return vega.framed(230, values) | {
        "mark": {"type": "bar", "color": palette.bar, "binSpacing": 0.6},
        "encoding": {
            "x": vega.binned(domain)
            | vega.axis(
                palette,
                "share of tokens it fires on",
                grid=False,
                values=whole,
                label=f"{vega.PERCENT.format('datum.value')}",
            ),
            "x2": {"field": "to"},
            "y": vega.field("n", [0, float(counts.max()) * 1.05]) | vega.axis(palette, "features", ticks=4),
            "tooltip": [vega.told("n", ",", "features"), vega.told("range", None, "fire on")],
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
    across, up = vega.roomy(density[alive]), vega.roomy(max_act[alive])
    return vega.framed(310, values) | {
        "params": [{"name": SELECTION, "select": {"type": "point", "fields": ["feature"], "on": "click"}}],
        "mark": {"type": "circle", "size": 22, "color": palette.bar, "opacity": 0.5, "cursor": "pointer"},
        "encoding": {
            "x": vega.field("density", across, log=True)
            | vega.axis(
                palette,
                "share of tokens it fires on",
                values=vega.decades(*across),
                label=vega.PERCENT.format("log(datum.value) / log(10)"),
            ),
            "y": vega.field("max", up, log=True)
            | vega.axis(palette, "largest activation", values=vega.ones_twos_fives(*up), format="~g"),
            "tooltip": [
                vega.told("feature"),
                vega.told("label"),
                vega.told("share", None, "fires on"),
                vega.told("max", ".2f"),
            ],
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
    return vega.framed(150, kept) | {
        "title": vega.title(title, palette),
        "mark": {"type": "line", "color": palette.bar, "strokeWidth": 1.8, "clip": True},
        "encoding": {
            "x": vega.field("tokens", [kept[0]["tokens"], kept[-1]["tokens"]])
            | vega.axis(palette, None, format="~s", grid=False, ticks=4),
            "y": vega.field("value", [0, top * 1.05]) | vega.axis(palette, None, format=format, ticks=3),
            "tooltip": [vega.told("tokens", ","), vega.told("value", ".4g", title)],
        },
    }
