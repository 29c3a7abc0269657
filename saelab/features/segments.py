"""Arrays in which the members of each group stand together."""

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


def positive_bits(values: Float[np.ndarray, " n"]) -> Int[np.ndarray, " n"]:
    """Integers below 2^32 in the same order as float32 values that are not negative."""
    return values.astype(np.float32, copy=False).view(np.uint32).astype(np.int64)
