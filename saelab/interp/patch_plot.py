"""A grid of patching effects as a file: a heat map (PNG, SVG, HTML) or JSON, by the file's ending."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from saelab.interp.heat_map import Picture, heat_map, svg
from saelab.interp.patching import PatchGrid
from saelab.interp.picture_page import Page, write_page


def write_grid(grid: PatchGrid, path: Path) -> list[Path]:
    """Write ``grid`` to ``path``, and beside a picture the numbers as JSON under the same name; the files written.

    Raises:
        ConfigError: the ending is not one of `saelab.interp.picture_page.SUFFIXES`.
        ArtifactError: the disk is full or not writable.
    """
    picture = picture_of(grid)
    page = Page("patch", picture.title, tuple(sentences(grid)), (svg(picture),), picture, as_json(grid))
    return write_page(page, path)


def as_json(grid: PatchGrid) -> dict[str, Any]:
    """Everything about the grid; ``shares`` are null where they are not defined (see `PatchGrid.shares`)."""
    shared = grid.has_shares
    return {
        "at": grid.at,
        "kind": grid.kind,
        "method": grid.method,
        "metric": grid.metric,
        "base": grid.base,
        "target": grid.target,
        "tokens": list(grid.tokens),
        "other_tokens": list(grid.other_tokens),
        "rows": list(grid.rows),
        "columns": list(grid.columns),
        "effects": grid.effects.tolist(),
        "shares": grid.shares.tolist() if shared else None,
    }


def picture_of(grid: PatchGrid) -> Picture:
    """The heat map of the shares, or of the effects where there are none."""
    shared = grid.has_shares
    return heat_map(
        grid.shares if shared else grid.effects,
        rows=grid.rows,
        columns=grid.columns,
        title=f"{grid.at}: {grid.kind}, {grid.method}",
        unit=f"share of the {grid.metric}" if shared else f"change of {grid.metric}",
        down="" if grid.at in ("position", "feature") else "layer",
    )


def sentences(grid: PatchGrid) -> list[str]:
    """What the numbers are of, for a reader who sees nothing else."""
    text = "".join(grid.tokens[1:])
    if grid.target is None:
        return [f"{grid.metric} on {text!r}: {grid.base:.4g}. Cells are replaced by {grid.kind} ablation."]
    other = "".join(grid.other_tokens[1:])
    return [
        f"{grid.metric} on {text!r}, which is run: {grid.base:.4g}; on {other!r}, whose values are put in: "
        f"{grid.target:.4g}."
    ]
