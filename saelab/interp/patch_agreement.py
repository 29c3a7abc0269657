"""How well an approximation of patching agrees with patching itself, over all cells of several prompt pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from saelab.errors import ConfigError, ShapeError
from saelab.interp.patching import PatchGrid
from saelab.stats import Interval, bootstrap


class Agreement(NamedTuple):
    pooled: Interval
    """Pearson correlation over the cells of all pairs together; the interval resamples pairs."""
    by_pair: tuple[float, ...]
    """The correlation over the cells of each pair."""
    slope: float
    """Least-squares factor from exact to approximate effects over all cells: below 1 they are too small."""
    n_cells: int


def agreement(exact: Sequence[PatchGrid], approximate: Sequence[PatchGrid]) -> Agreement:
    """Correlation of the effects of the same cells, computed exactly and approximated.

    Raises:
        ConfigError: no pair, or effects that are all the same, for which a correlation is not defined.
        ShapeError: the grids are not of the same cells.
    """
    if not exact or len(exact) != len(approximate):
        raise ConfigError(f"there are {len(exact)} exact and {len(approximate)} approximate grids; give one for each")
    sums = []
    for ours, theirs in zip(exact, approximate, strict=True):
        if (ours.rows, ours.columns, ours.tokens) != (theirs.rows, theirs.columns, theirs.tokens):
            raise ShapeError("two grids have other cells or another text, so they cannot be compared; patch the same")
        if len(set(ours.effects.flatten().tolist())) < 2 or len(set(theirs.effects.flatten().tolist())) < 2:
            raise ConfigError("the effects of a grid are all the same, so they correlate with nothing; take more cells")
        x, y = (grid.effects.double().flatten().numpy() for grid in (ours, theirs))
        sums.append([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    columns = np.array(sums)
    n, sx, sy, sxx, _, sxy = columns.sum(0)
    return Agreement(
        pooled=bootstrap(_pearson, columns),
        by_pair=tuple(float(r) for r in _pearson(columns)),
        slope=float((sxy - sx * sy / n) / (sxx - sx * sx / n)),
        n_cells=int(n),
    )


def _pearson(sums: Float[np.ndarray, "draws 6"]) -> Float[np.ndarray, " draws"]:
    """Correlation from the columns n, sum x, sum y, sum x^2, sum y^2, sum xy."""
    n, sx, sy, sxx, syy, sxy = sums.T
    return (n * sxy - sx * sy) / np.sqrt((n * sxx - sx**2) * (n * syy - sy**2))
