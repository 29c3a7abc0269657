"""Statistics of each feature's positive activations: the exact quantiles, and the histogram below its maximum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int

from saelab.features.codes import Pairs
from saelab.features.scan import BINS
from saelab.features.segments import positive_bits

QUANTILES = (0.5, 0.9, 0.99)


class Histograms(NamedTuple):
    """Bins of equal ratio, an eighth of an octave each, downwards from the one that holds the maximum. The lowest takes
    all that is below."""

    counts: Int[np.ndarray, "features bins"]
    edges: Float[np.ndarray, "features bins_plus_1"]
    """From 0 to the maximum."""


def histograms(
    bin_counts: Int[np.ndarray, "features all_bins"], maxima: Float[np.ndarray, " features"], *, n_bins: int
) -> Histograms:
    """The ``n_bins`` highest bins of each feature, from counts in all ``BINS``."""
    first = top_bin(maxima)[:, None] - np.arange(n_bins - 1, -1, -1)
    below = np.concatenate([np.zeros((len(maxima), 1), np.int64), np.cumsum(bin_counts, axis=1)], axis=1)
    starts = np.maximum(first, 0)
    starts[:, 0] = 0
    ends = np.concatenate([starts[:, 1:], np.full((len(maxima), 1), BINS.n_bins)], axis=1)
    counts = np.take_along_axis(below, ends, 1) - np.take_along_axis(below, starts, 1)
    return Histograms(counts, edges_below(maxima, first))


def top_bin(maxima: Float[np.ndarray, " features"]) -> Int[np.ndarray, " features"]:
    """The bin that each maximum falls into."""
    return BINS.of(torch.from_numpy(maxima)).numpy()


def edges_below(
    maxima: Float[np.ndarray, " features"], first: Int[np.ndarray, "features n"]
) -> Float[np.ndarray, "features n_plus_1"]:
    """Where the bins ``first`` begin and, last, the maximum. 0 for what takes all that is below."""
    edges = BINS.lower_edge(torch.from_numpy(np.maximum(first, 0))).numpy()
    edges = np.where(first > 0, edges, 0)
    edges[:, 0] = 0
    return np.concatenate([np.minimum(edges, maxima[:, None]), maxima[:, None]], axis=1, dtype=np.float32)


def quantiles(pairs: Pairs) -> Float[np.ndarray, "features 3"]:
    """At 0.5, 0.9 and 0.99, linear between order statistics (numpy's default); 0 for a feature that never fires.

    From the pairs, which labels need anyway, and not from the histogram: an eighth of an octave is 9 %.
    """
    features, values, offsets = pairs.features, pairs.values, pairs.offsets
    n = np.diff(offsets)
    if not len(values):
        return np.zeros((len(n), len(QUANTILES)))
    # one integer sort orders by feature and then by value
    keys = positive_bits(values)
    keys |= features << 32
    keys.sort()
    ordered = (keys & 0xFFFFFFFF).astype(np.uint32).view(np.float32)
    rank = np.maximum(n - 1, 0)[:, None] * np.asarray(QUANTILES)
    below = np.floor(rank).astype(np.int64)
    start = np.minimum(offsets[:-1], len(values) - 1)[:, None]
    low = ordered[start + below].astype(np.float64)
    high = ordered[start + np.minimum(below + 1, np.maximum(n - 1, 0)[:, None])]
    return np.where(n[:, None] > 0, low + (rank - below) * (high - low), 0)
