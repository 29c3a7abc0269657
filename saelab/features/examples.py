"""Which firings stand for the range of a feature's activations, and the text around chosen positions.

Interval examples are a uniform sample of the firings in each of several intervals of activation, downwards from the
maximum: those with the smallest hash of (seed, feature, position in the store). An interval is an octave, so each
begins at half the height of the one above; the highest is cut by the maximum and begins between a half and three
quarters of it; the lowest takes all that is below. Such intervals, unlike equal shares of the maximum, are unions of
bins that a single pass can sample before it knows the maximum.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.features.codes import Pairs
from saelab.features.scan import BINS, GROUP
from saelab.features.statistics import edges_below, top_bin
from saelab_kernels.search import TopState, empty_top, merge_top_

#: Sampled groups of bins in an interval: two half octaves.
_PER_INTERVAL = 2


class Windows(NamedTuple):
    """The text around chosen positions; -1 (token) and 0 (activation) behind the end of a shorter window."""

    token_ids: Int[np.ndarray, "features slots window"]
    acts: Float[np.ndarray, "features slots window"]
    peaks: Int[np.ndarray, "features slots"]
    """Index of the chosen position in its window."""


class IntervalExamples(NamedTuple):
    """From the lowest interval to the highest."""

    positions: Int[np.ndarray, "features intervals per_interval"]
    """In the store; -1 where there are fewer."""
    edges: Float[np.ndarray, "features intervals_plus_1"]
    """Where each interval begins and, last, the maximum; from 0."""


def interval_examples(
    sample: TopState, maxima: Float[np.ndarray, " features"], *, n_intervals: int
) -> IntervalExamples:
    """The smallest hashes of each interval, from those of each half octave."""
    n_groups, per_interval = BINS.n_bins // GROUP, sample.positions.shape[1]
    drawn = sample.kept()
    features, groups = drawn.features // n_groups, drawn.features % n_groups
    highest = torch.from_numpy(top_bin(maxima) // GROUP)
    intervals = n_intervals - 1 - (highest[features] - groups) // _PER_INTERVAL
    chosen = empty_top(len(maxima) * n_intervals, per_interval, dtype=torch.int64)
    merge_top_(chosen, features * n_intervals + intervals.clamp_min(0), drawn.positions, drawn.values)
    down = np.arange(n_intervals - 1, -1, -1) * _PER_INTERVAL + (_PER_INTERVAL - 1)
    return IntervalExamples(
        positions=chosen.positions.numpy().reshape(len(maxima), n_intervals, per_interval),
        edges=edges_below(maxima, (highest.numpy()[:, None] - down) * GROUP),
    )


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
