"""Which positions show what a feature does, and the text around them.

Top examples are ordered by value (highest first), then by position: a total order, so the same pairs always give the
same list. Each row of the store gives at most one, its highest position (the first of equals), so that the list is not
one burst. Interval examples are a uniform sample of the firings in each of several equal-width intervals of activation:
those with the smallest hash of (seed, feature, position in the store).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int, UInt64

from saelab.features.codes import Pairs
from saelab.features.segments import first_n, first_of_run, positive_bits, segment_max
from saelab.features.statistics import activation_bin


class Windows(NamedTuple):
    """The text around chosen positions; -1 (token) and 0 (activation) behind the end of a shorter window."""

    token_ids: Int[np.ndarray, "features slots window"]
    acts: Float[np.ndarray, "features slots window"]
    peaks: Int[np.ndarray, "features slots"]
    """Index of the chosen position in its window."""


def top_positions(pairs: Pairs, *, context: int, n: int) -> Int[np.ndarray, "features n"]:
    """The ``n`` highest activations of each feature, one from each row; -1 where there are fewer."""
    features = pairs.features
    rows = pairs.positions // context
    starts = np.flatnonzero(first_of_run(features, rows))
    if not len(starts):
        return np.full((pairs.n_features, n), -1)
    ends = np.append(starts[1:], len(features))
    peak_values = segment_max(pairs.values, np.append(starts, len(features)))
    is_peak = pairs.values == np.repeat(peak_values, ends - starts)
    # the first position of each run that reaches the run's peak
    at = np.flatnonzero(is_peak)
    at = at[first_of_run(features[at], rows[at])]
    at = at[_among_highest(features[at], pairs.values[at], pairs.n_features, n)]
    order = np.lexsort((pairs.positions[at], -pairs.values[at], features[at]))
    return first_n(features[at][order], pairs.positions[at][order], pairs.n_features, n)


def interval_positions(
    pairs: Pairs,
    maxima: Float[np.ndarray, " features"],
    *,
    n_intervals: int,
    per_interval: int,
    seed: int,
    first_feature: int,
    store_positions: Int[np.ndarray, " positions"],
) -> Int[np.ndarray, "features intervals per_interval"]:
    """A uniform sample of the firings in each activation interval; -1 where there are fewer.

    ``store_positions`` gives the place in the store of each indexed position, and ``first_feature`` the number of the
    block's first feature, so that a sample depends neither on the blocks nor on which other rows are indexed.
    """
    features, n_groups = pairs.features, pairs.n_features * n_intervals
    groups = features * n_intervals + activation_bin(pairs.values, maxima[features], n_intervals)
    keys = hash64(seed, features + first_feature, store_positions[pairs.positions])
    # a group of n keeps keys below 8 * per_interval / n of their range: enough for all but one group in millions
    sizes = np.bincount(groups, minlength=n_groups)
    bound = np.minimum(8 * per_interval / np.maximum(sizes, 1), 1)[groups]
    low = keys.astype(np.float64) <= bound * 2.0**64
    short = np.bincount(groups[low], minlength=n_groups) < np.minimum(per_interval, sizes)
    kept = np.flatnonzero(low | short[groups])
    order = kept[np.lexsort((pairs.positions[kept], keys[kept], groups[kept]))]
    chosen = first_n(groups[order], pairs.positions[order], n_groups, per_interval)
    return chosen.reshape(-1, n_intervals, per_interval)


def windows(
    pairs: Pairs,
    positions: Int[np.ndarray, "features slots"],
    tokens: Int[np.ndarray, "rows context"],
    *,
    window: int,
    after: int,
) -> Windows:
    """``window`` tokens around each position with the feature's activations, ``after`` of them behind it.

    A window stays inside its row: near an end it is moved, and it is shorter only where the row is. The BOS token may
    be shown; its activation counts as 0.
    """
    context = tokens.shape[1]
    width = min(window, context)
    used = positions >= 0
    row, column = np.divmod(np.maximum(positions, 0), context)
    first = np.clip(column - (window - 1 - after), 0, context - width)
    start = row * context + first
    shown = start[..., None] + np.arange(width)
    token_ids = np.full((*positions.shape, window), -1, np.int32)
    token_ids[..., :width] = np.where(used[..., None], tokens.reshape(-1)[shown], -1)
    acts = np.zeros((*positions.shape, window), np.float32)
    feature, slot = np.nonzero(used)
    n_positions = tokens.size
    # one search for each window's start; its activations are among the next `width` pairs
    keys = pairs.features * n_positions + pairs.positions
    at = np.searchsorted(keys, feature * n_positions + start[feature, slot])[:, None] + np.arange(width)
    inside = np.minimum(at, len(keys) - 1)
    offset = keys[inside] - (feature * n_positions + start[feature, slot])[:, None]
    hit = (at < len(keys)) & (offset < width)
    which, _ = np.nonzero(hit)
    acts[feature[which], slot[which], offset[hit]] = pairs.values[inside[hit]]
    return Windows(token_ids, acts, np.where(used, column - first, 0))


def hash64(seed: int, features: Int[np.ndarray, " n"], positions: Int[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    """A fixed pseudo-random number of each (seed, feature, position): the mixer of SplitMix64 (Steele et al. 2014),
    applied to each in turn."""
    start = _mix(np.array([seed % 2**64], np.uint64) + np.uint64(0x9E3779B97F4A7C15))
    return _mix(_mix(start ^ features.astype(np.uint64)) ^ positions.astype(np.uint64))


def _mix(z: UInt64[np.ndarray, " n"]) -> UInt64[np.ndarray, " n"]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _among_highest(
    groups: Int[np.ndarray, " m"], values: Float[np.ndarray, " m"], n_groups: int, n: int
) -> Bool[np.ndarray, " m"]:
    """True for values not below the n-th highest of their group; groups come in order, values are above 0."""
    keys = groups << 32 | 0xFFFFFFFF - positive_bits(values)
    ends = np.cumsum(np.bincount(groups, minlength=n_groups))
    nth = np.minimum(ends - 1, np.concatenate([[0], ends[:-1]]) + n - 1)
    return keys <= np.sort(keys)[nth][groups]
