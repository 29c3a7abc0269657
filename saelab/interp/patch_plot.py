"""A grid of patching effects as a file: a heat map (PNG, SVG, HTML) or JSON, by the file's ending."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

from saelab import atomic
from saelab.errors import ConfigError
from saelab.interp.heat_map import Picture, heat_map, png, svg
from saelab.interp.patching import PatchGrid

SUFFIXES = (".png", ".svg", ".html", ".json")


def write_grid(grid: PatchGrid, path: Path) -> list[Path]:
    """Write ``grid`` to ``path``, and beside a picture the numbers as JSON under the same name; the files written.

    Raises:
        ConfigError: the ending is not one of `SUFFIXES`.
        ArtifactError: the disk is full or not writable.
    """
    check_suffix(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = path.with_suffix(".json")
    atomic.write_json(numbers, as_json(grid))
    if path == numbers:
        return [numbers]
    picture = picture_of(grid)
    match path.suffix:
        case ".png":
            atomic.write_bytes(path, png(picture))
        case ".svg":
            atomic.write_bytes(path, svg(picture).encode())
        case _:
            atomic.write_bytes(path, _page(grid, picture).encode())
    return [path, numbers]


def check_suffix(path: Path) -> None:
    """Raise ConfigError unless the ending of ``path`` says what to write."""
    if path.suffix not in SUFFIXES:
        raise ConfigError(f"{path} ends in {path.suffix or 'nothing'}; end it in {', '.join(SUFFIXES)}")


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


def _page(grid: PatchGrid, picture: Picture) -> str:
    body = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences(grid))
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>saelab patch: {escape(grid.at)}</title>"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<style>:root { color-scheme: light dark; } body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem;"
        " overflow-wrap: anywhere; } svg { max-width: 100%; height: auto; }</style></head>"
        f"<body><h1>{escape(picture.title)}</h1>{body}{svg(picture)}</body></html>\n"
    )
