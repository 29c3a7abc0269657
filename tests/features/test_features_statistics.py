from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features.codes import Pairs
from saelab.features.statistics import QUANTILES, feature_statistics


def random_pairs(rng, n_features=7, n_positions=60, share=0.3) -> tuple[Pairs, np.ndarray]:
    """Pairs, and the dense matrix [features, positions] they come from; values repeat, one feature is silent."""
    shape = (n_features, n_positions)
    dense = np.where(rng.random(shape) < share, rng.integers(1, 9, shape) / 4, 0).astype(np.float32)
    dense[n_features // 2] = 0
    features, positions = np.nonzero(dense)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(features, minlength=n_features))])
    return Pairs(offsets, positions.astype(np.int32), dense[features, positions]), dense


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(0.01, 0.9))
def test_statistics_equal_those_of_the_dense_matrix(seed, share):
    pairs, dense = random_pairs(np.random.default_rng(seed), share=share)
    found = feature_statistics(pairs, n_bins=5)
    for i, row in enumerate(dense):
        positive = row[row > 0]
        assert found.n_fired[i] == len(positive)
        assert found.max[i] == row.max()
        if len(positive):
            assert found.mean[i] == pytest.approx(positive.mean(dtype=np.float64))
            np.testing.assert_allclose(found.quantiles[i], np.quantile(positive.astype(np.float64), QUANTILES))
            counts, _ = np.histogram(positive, bins=5, range=(0, row.max()))
            assert found.histogram[i].sum() == len(positive)
            # numpy computes edges in another order, so a value on an edge may fall to either side
            on_an_edge = (np.mod(positive / row.max() * 5, 1) == 0).sum()
            assert np.abs(np.cumsum(found.histogram[i]) - np.cumsum(counts)).max() <= on_an_edge


def test_a_feature_that_never_fires_has_zeros():
    pairs, dense = random_pairs(np.random.default_rng(0))
    found = feature_statistics(pairs, n_bins=5)
    silent = len(dense) // 2
    assert found.max[silent] == found.mean[silent] == found.n_fired[silent] == found.histogram[silent].sum() == 0
    assert (found.quantiles[silent] == 0).all()


def test_the_maximum_belongs_to_the_last_bin():
    pairs = Pairs(np.array([0, 3]), np.arange(3, dtype=np.int32), np.array([1.0, 2.0, 4.0], np.float32))
    assert feature_statistics(pairs, n_bins=4).histogram.tolist() == [[0, 1, 1, 1]]


def test_no_pairs_at_all_is_no_error():
    found = feature_statistics(Pairs(np.zeros(4, np.int64), np.empty(0, np.int32), np.empty(0, np.float32)), n_bins=3)
    assert found.n_fired.tolist() == [0, 0, 0]
