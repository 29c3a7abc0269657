"""Arrays in which the members of each group stand together: the one layout behind every statistic of a feature."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int


def first_of_run(*columns: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " n"]:
    """True where any column differs from the element before, and at the first element."""
    first = np.ones(len(columns[0]), bool)
    first[1:] = np.any([column[1:] != column[:-1] for column in columns], axis=0)
    return first


def rank_within(groups: Int[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """0, 1, 2, ... within each group; ``groups`` is sorted."""
    index = np.arange(len(groups))
    return index - np.maximum.accumulate(np.where(first_of_run(groups), index, 0)) if len(groups) else index


def first_n(
    groups: Int[np.ndarray, " m"], values: Int[np.ndarray, " m"], n_groups: int, n: int
) -> Int[np.ndarray, "groups n"]:
    """The first ``n`` values of each group in their order, -1 where there are fewer; ``groups`` is sorted."""
    rank = rank_within(groups)
    kept = rank < n
    chosen = np.full((n_groups, n), -1, np.int64)
    chosen[groups[kept], rank[kept]] = values[kept]
    return chosen


def segment_max(
    values: Float[np.ndarray, " n"], offsets: Int[np.ndarray, " segments_plus_1"]
) -> Float[np.ndarray, " segments"]:
    """Largest value of each segment ``offsets[i]:offsets[i + 1]``, 0 for an empty one."""
    maxima = np.zeros(len(offsets) - 1, values.dtype)
    filled = np.diff(offsets) > 0
    if filled.any():
        # an empty segment has no start of its own, so the starts of the filled ones delimit them
        maxima[filled] = np.maximum.reduceat(values, offsets[:-1][filled])
    return maxima


def positive_bits(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Integers below 2^32 in the same order as float32 values that are not negative."""
    return values.astype(np.float32, copy=False).view(np.uint32).astype(np.int64)
