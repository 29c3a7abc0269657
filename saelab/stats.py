"""Uncertainty of reported numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float


class Interval(NamedTuple):
    """A value with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]],
    sums: Float[np.ndarray, "clusters columns"],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """Percentile bootstrap over clusters (documents or sequences) of a statistic of column sums.

    ``sums[i]`` holds what cluster i adds to each total (numerators, denominators, counts); ``statistic`` maps a stack
    of totals to one value each. Whole clusters are resampled, because tokens of one text are not independent.
    Source: Efron and Tibshirani 1993, chapters 13 and 8.

    Raises:
        ValueError: no clusters.
    """
    if len(sums) == 0:
        raise ValueError("bootstrap needs at least one cluster, got none")
    value = float(statistic(sums.sum(0, keepdims=True))[0])
    rng = np.random.default_rng(seed)
    # counting how often each cluster is drawn turns all resampled totals into one matrix product
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    low, high = np.quantile(statistic(counts @ sums), [0.025, 0.975])
    return Interval(value, float(low), float(high))
