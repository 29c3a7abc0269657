from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.codes import Pairs
from saelab.features.scan import BINS
from saelab.features.statistics import QUANTILES, histograms, quantiles


def random_pairs(rng, n_features=7, n_positions=60, share=0.3) -> tuple[Pairs, np.ndarray]:
    """Pairs, and the dense matrix [features, positions] they come from; values repeat, one feature is silent."""
    shape = (n_features, n_positions)
    dense = np.where(rng.random(shape) < share, rng.integers(1, 90, shape) / 4, 0).astype(np.float32)
    dense[n_features // 2] = 0
    features, positions = np.nonzero(dense)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=n_features))])
    return Pairs(offsets, positions.astype(np.int32), dense[features, positions]), dense


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.9))
def test_quantiles_equal_those_of_the_dense_matrix(seed, share):
    pairs, dense = random_pairs(np.random.default_rng(seed), share=share)
    for found, row in zip(quantiles(pairs), dense, strict=True):
        positive = row[row > 0].astype(np.float64)
        np.testing.assert_allclose(found, np.quantile(positive, QUANTILES) if len(positive) else 0)


def test_no_pairs_at_all_is_no_error():
    found = quantiles(Pairs(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)))
    assert (found == 0).all()
    assert found.shape == (3, 3)


def counted(rows: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Counts in all bins, and the maximum, of each list of values."""
    values = [np.asarray(row, np.float32) for row in rows]
    bins = [BINS.of(torch.from_numpy(row)).numpy() for row in values]
    counts = np.stack([np.bincount(row, minlength=BINS.n_bins) for row in bins])
    return counts.astype(np.int32), np.array([row.max(initial=0) for row in values], np.float32)


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 300), st.floats(0.1, 6.0))
def test_a_histogram_holds_every_firing_between_its_edges(seed, n_bins, spread):
    rng = np.random.default_rng(seed)
    rows = [rng.lognormal(0, spread, n).astype(np.float32) for n in (0, 1, 50, 1000)]
    counts, maxima = counted(rows)
    found = histograms(counts, maxima, n_bins=n_bins)
    assert found.counts.shape == (4, n_bins)
    assert found.edges.shape == (4, n_bins + 1)
    for row, mine, edges in zip(rows, found.counts, found.edges, strict=True):
        assert mine.sum() == len(row)
        assert (np.diff(edges) >= 0).all()
        assert edges[0] == 0
        assert edges[-1] == row.max(initial=0)
        assert mine[-1] == (row >= edges[-2]).sum() if len(row) else not mine.any()
        for low, high, n in zip(edges[:-2], edges[1:-1], mine, strict=False):
            assert n == ((row >= low) & (row < high)).sum()


def test_bins_are_an_eighth_of_an_octave_down_from_the_maximum():
    counts, maxima = counted([np.array([1.0, 1.9, 2.0, 3.0, 0.25])])
    found = histograms(counts, maxima, n_bins=10)
    # the maximum 3 lies in [3, 3.25); the tenth bin down would be [1.375, 1.5), and takes all below as well
    assert found.edges[0].tolist() == [0, 1.5, 1.625, 1.75, 1.875, 2, 2.25, 2.5, 2.75, 3, 3]
    assert found.counts[0].tolist() == [2, 0, 0, 0, 1, 1, 0, 0, 0, 1]
