"""Exact statistics of each feature's positive activations, from feature-major pairs."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from saelab.features.codes import Pairs
from saelab.features.segments import positive_bits, segment_max

QUANTILES = (0.5, 0.9, 0.99)


class Statistics(NamedTuple):
    """Of the tokens on which a feature fires; 0 for one that never does."""

    n_fired: Int[np.ndarray, " features"]
    max: Float[np.ndarray, " features"]
    mean: Float[np.ndarray, " features"]
    quantiles: Float[np.ndarray, "features 3"]
    """At 0.5, 0.9 and 0.99, linear between order statistics (numpy's default)."""
    histogram: Int[np.ndarray, "features bins"]
    """Counts in equal-width bins from 0 to ``max``; the maximum belongs to the last bin."""


def feature_statistics(pairs: Pairs, *, n_bins: int) -> Statistics:
    """Density is ``n_fired`` over the number of indexed tokens, which the caller knows."""
    n_fired, features = pairs.n_fired, pairs.features
    maxima = segment_max(pairs.values, pairs.offsets)
    sums = np.bincount(features, weights=pairs.values, minlength=len(n_fired))
    bins = activation_bin(pairs.values, maxima[features], n_bins)
    histogram = np.bincount(features * n_bins + bins, minlength=len(n_fired) * n_bins)
    return Statistics(
        n_fired=n_fired,
        max=maxima,
        mean=sums / np.maximum(n_fired, 1),
        quantiles=_quantiles(features, pairs.values, pairs.offsets),
        histogram=histogram.reshape(-1, n_bins),
    )


def activation_bin(
    values: Float[np.ndarray, " pairs"], maxima: Float[np.ndarray, " pairs"], n_bins: int
) -> Int[np.ndarray, " pairs"]:
    """Which of ``n_bins`` equal-width bins between 0 and the feature's maximum each value falls into."""
    return np.minimum((values / maxima * n_bins).astype(np.int64), n_bins - 1)


def _quantiles(
    features: Int[np.ndarray, " pairs"],
    values: Float[np.ndarray, " pairs"],
    offsets: Int[np.ndarray, " features_plus_1"],
) -> Float[np.ndarray, "features 3"]:
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
