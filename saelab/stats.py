"""Uncertainty of reported numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

#: Maps a stack of column sums to one value each.
Statistic = Callable[[Float[np.ndarray, "draws columns"]], Float[np.ndarray, " draws"]]


class Interval(NamedTuple):
    """A value with a 95 % bootstrap interval."""

    value: float
    low: float
    high: float


def bootstrap(
    statistic: Statistic,
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
    value = float(_total(statistic, sums)[0])
    return percentile_interval(value, resampled(statistic, sums, draws=draws, seed=seed))


def percentile_interval(value: float, resamples: Float[np.ndarray, " draws"]) -> Interval:
    """``value`` with the interval that holds the middle 95 % of what its resamples give."""
    low, high = np.quantile(resamples, [0.025, 0.975])
    return Interval(value, float(low), float(high))


def ratio(sums: Float[np.ndarray, "draws 2"]) -> Float[np.ndarray, " draws"]:
    """The statistic first column / second column."""
    return sums[:, 0] / sums[:, 1]


def superiority(high: Float[np.ndarray, " n"], low: Float[np.ndarray, " m"]) -> float:
    """Share of the pairs (one of each) in which the first is larger, ties counting half: an AUROC, 0.5 is chance.

    Source: Mann and Whitney 1947.

    Raises:
        ValueError: no values on one side.
    """
    if not len(high) or not len(low):
        raise ValueError(f"superiority needs values on both sides, got {len(high)} and {len(low)}")
    order = np.sort(low)
    below = np.searchsorted(order, high, side="left") + np.searchsorted(order, high, side="right")
    return float(below.mean() / 2 / len(low))


def interval_of_mean(values: Float[np.ndarray, " clusters"], *, draws: int = 1000, seed: int = 0) -> Interval:
    """The mean of one value a cluster, with its bootstrap interval.

    Raises:
        ValueError: no values.
    """
    return bootstrap(ratio, np.stack([values, np.ones(len(values))], 1), draws=draws, seed=seed)


def bootstrap_mean(
    statistic: Statistic, strata: Sequence[Float[np.ndarray, "_ columns"]], *, draws: int = 1000, seed: int = 0
) -> Interval:
    """The mean over strata (tasks, letters) of a statistic of each, where each stratum's own clusters are resampled.

    The strata themselves are fixed: the interval says nothing about other tasks.

    Raises:
        ValueError: no strata, or one without clusters.
    """
    if not strata:
        raise ValueError("bootstrap_mean needs at least one stratum, got none")
    value = float(np.mean([_total(statistic, sums)[0] for sums in strata]))
    seeds = range(seed * len(strata), (seed + 1) * len(strata))
    resamples = [resampled(statistic, s, draws=draws, seed=i) for s, i in zip(strata, seeds, strict=True)]
    return percentile_interval(value, np.mean(resamples, axis=0))


def bootstrap_difference(
    statistic: Statistic,
    first: Float[np.ndarray, "clusters columns"],
    second: Float[np.ndarray, "others columns"],
    *,
    paired: bool,
    draws: int = 1000,
    seed: int = 0,
) -> Interval:
    """``statistic(first) - statistic(second)``; the columns of the two may differ, if ``statistic`` takes both.

    ``paired``: row i of both belongs to the same cluster (two SAEs read the same sequence), so that both are resampled
    alike and what makes a sequence hard for both cancels. Source: Efron and Tibshirani 1993, chapter 16.

    Raises:
        ValueError: no clusters, or paired sums of different lengths.
    """
    if paired and len(first) != len(second):
        raise ValueError(f"paired sums need the same clusters, got {len(first)} and {len(second)}")
    value = float(_total(statistic, first)[0] - _total(statistic, second)[0])
    ours = resampled(statistic, first, draws=draws, seed=seed)
    theirs = resampled(statistic, second, draws=draws, seed=seed if paired else seed + 1)
    return percentile_interval(value, ours - theirs)


def resampled(
    statistic: Statistic, sums: Float[np.ndarray, "clusters columns"], *, draws: int, seed: int
) -> Float[np.ndarray, " draws"]:
    """The statistic of ``draws`` resamples of the clusters; the same seed draws the same clusters.

    Raises:
        ValueError: no clusters.
    """
    if len(sums) == 0:
        raise ValueError("bootstrap needs at least one cluster, got none")
    rng = np.random.default_rng(seed)
    # counting how often each cluster is drawn turns all resampled totals into one matrix product
    counts = rng.multinomial(len(sums), np.full(len(sums), 1 / len(sums)), size=draws)
    return statistic(counts @ sums)


class Matching(NamedTuple):
    """Partners: row ``left[i]`` belongs to column ``right[i]``; each is taken at most once."""

    left: Int[np.ndarray, " pairs"]
    right: Int[np.ndarray, " pairs"]


def best_matching(similarity: Float[np.ndarray, "rows columns"]) -> Matching:
    """The one-to-one assignment of rows to columns with the largest sum of similarities (Hungarian problem).

    The shorter side is matched whole. Source: Kuhn 1955; scipy solves it by the method of Jonker and Volgenant.
    """
    from scipy.optimize import linear_sum_assignment

    left, right = linear_sum_assignment(similarity, maximize=True)
    return Matching(left, right)


def _total(statistic: Statistic, sums: Float[np.ndarray, "clusters columns"]) -> Float[np.ndarray, " 1"]:
    if len(sums) == 0:
        raise ValueError("bootstrap needs at least one cluster, got none")
    return statistic(sums.sum(0, keepdims=True))
