"""Pictures of two SAEs: how alike nearest features are, and where each pair stands."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from saelab_explorer import vega
from saelab_explorer.charts import SELECTION
from saelab_explorer.theme import Palette
from saelab_explorer.vega import Spec


def similarities(
    found: Float[np.ndarray, " n"], control: Float[np.ndarray, " m"], what: str, palette: Palette, *, n_bins: int = 40
) -> Spec:
    """Features by similarity with their nearest one, and the same where nothing can match as a dashed outline."""
    low = min(0.0, float(min(found.min(), control.min())))
    edges = np.linspace(low, max(1.0, float(found.max())), n_bins + 1)
    counts, chance = (np.histogram(values, bins=edges)[0] for values in (found, control))
    starts, ends = edges[:-1].tolist(), edges[1:].tolist()
    values = [
        {"from": round(a, 4), "to": round(b, 4), "n": int(n), "chance": int(c), "range": f"{a:.2f} to {b:.2f}"}
        for a, b, n, c in zip(starts, ends, counts, chance, strict=True)
    ]
    steps = [*values, {"from": ends[-1], "n": 0, "chance": 0}]
    tallest = float(max(counts.max(), chance.max(), 1)) * 1.06
    x = vega.binned([edges[0], edges[-1]]) | vega.axis(palette, what, grid=False, format=".1f")
    y = [vega.field(name, [0, tallest]) | vega.axis(palette, "features", ticks=4) for name in ("n", "chance")]
    told = [vega.told("range", None, what), vega.told("n", ",", "features"), vega.told("chance", ",", "by chance")]
    outline = {"type": "line", "interpolate": "step-after", "color": palette.muted, "strokeDash": [4, 3]}
    return vega.framed(260, values) | {
        "layer": [
            {
                "mark": {"type": "bar", "color": palette.bar, "binSpacing": 0.6},
                "encoding": {"x": x, "x2": {"field": "to"}, "y": y[0], "tooltip": told},
            },
            {
                "data": {"values": steps},
                "mark": outline,
                "encoding": {"x": vega.field("from", [edges[0], edges[-1]]), "y": y[1]},
            },
        ]
    }


def partners(
    features: Int[np.ndarray, " pairs"],
    others: Int[np.ndarray, " pairs"],
    similarity: Float[np.ndarray, " pairs"],
    mutual: np.ndarray,
    places: tuple[Float[np.ndarray, " pairs"], Float[np.ndarray, " pairs"]],
    labels: Sequence[str],
    title: str,
    names: tuple[str, str],
    palette: Palette,
) -> Spec | None:
    """One dot a pair on two logarithmic axes; on the dashed line both are equal. A click selects the first feature.

    Pairs with nothing on one of the axes have no logarithm and are left out.
    """
    shown = np.flatnonzero((places[0] > 0) & (places[1] > 0))
    if not len(shown):
        return None
    values: list[dict[str, Any]] = [
        {
            "feature": int(features[i]),
            "other": int(others[i]),
            "x": float(f"{places[0][i]:.3g}"),
            "y": float(f"{places[1][i]:.3g}"),
            "alike": round(float(similarity[i]), 3),
            "mutual": "1" if mutual[i] else "0",
            "label": labels[int(features[i])],
        }
        for i in shown
    ]
    domain = vega.roomy(np.concatenate([places[0][shown], places[1][shown]]))
    ticks = vega.decades(*domain)
    ticks = ticks if len(ticks) > 1 else vega.ones_twos_fives(*domain)
    kind = {"field": "mutual", "type": "nominal", "legend": None}
    colours = {"domain": ["1", "0"], "range": [f"{palette.series[0]}a6", f"{palette.muted}48"]}
    told = [
        vega.told("feature", None, names[0]),
        vega.told("other", None, names[1]),
        vega.told("alike", ".3f", "similarity"),
        vega.told("x", ".3g", f"{title}, {names[0]}"),
        vega.told("y", ".3g", f"{title}, {names[1]}"),
        vega.told("label"),
    ]
    ends = [{"x": end, "y": end} for end in domain]
    across = vega.field("x", domain, log=True) | vega.axis(palette, f"{title}, {names[0]}", values=ticks, format="~g")
    up = vega.field("y", domain, log=True) | vega.axis(palette, f"{title}, {names[1]}", values=ticks, format="~g")
    return vega.framed(330, values) | {
        "layer": [
            {
                "data": {"values": ends},
                "mark": {"type": "line", "color": palette.line_strong, "strokeDash": [4, 3]},
                "encoding": {"x": across, "y": up},
            },
            {
                "params": [{"name": SELECTION, "select": {"type": "point", "fields": ["feature"], "on": "click"}}],
                "mark": {"type": "circle", "size": 26, "cursor": "pointer"},
                "encoding": {
                    "x": across,
                    "y": up,
                    "color": {**kind, "scale": colours},
                    "tooltip": told,
                },
            },
        ],
    }
