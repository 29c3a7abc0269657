from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.features import neighbours
from saelab.features.codes import Codes


def codes_of(fires: np.ndarray) -> Codes:
    """Codes of a bool matrix [positions, features]."""
    positions, features = np.nonzero(fires)
    offsets = np.concatenate([[0], np.cumsum(np.bincount(positions, minlength=len(fires)))])
    return Codes(offsets, features.astype(np.int32), np.ones(len(features), np.float32), fires.sum(0))


def brute(scores: np.ndarray, n: int, least: float):
    ranked = [sorted((-s, j) for j, s in enumerate(row) if j != i and s > least) for i, row in enumerate(scores)]
    return [[(j, s) for s, j in row[:n]] for row in ranked]


@settings(deadline=None)
@given(st.integers(0, 1000), st.integers(1, 9), st.integers(1, 7))
def test_coactivation_is_the_jaccard_index(seed, n_features, n):
    rng = np.random.default_rng(seed)
    fires = rng.random((80, n_features)) < rng.random(n_features)
    fires[rng.random(80) < 0.3] = False
    codes = codes_of(fires)
    everything = neighbours.coactivation_sample(codes, np.arange(80), seed=0)
    found = neighbours.by_coactivation(codes, everything, n=n)
    together = fires.T.astype(int) @ fires
    either = fires.sum(0)[:, None] + fires.sum(0) - together
    jaccard = np.where(together >= neighbours.MIN_TOGETHER, together / np.maximum(either, 1), 0).astype(np.float32)
    for i, expected in enumerate(brute(jaccard, n, 0)):
        assert [f for f in found.features[i].tolist() if f >= 0] == [j for j, _ in expected]
        np.testing.assert_allclose(found.scores[i][: len(expected)], [-s for _, s in expected])


@pytest.mark.parametrize(("d_sae", "n"), [(1, 3), (2, 1), (13, 4), (13, 13)])
def test_cosine_neighbours_are_the_nearest_directions(d_sae, n):
    W_dec = torch.randn(d_sae, 5, generator=torch.Generator().manual_seed(d_sae)) * 3
    found = neighbours.by_cosine(W_dec, n=n)
    cosine = torch.nn.functional.cosine_similarity(W_dec[:, None], W_dec[None], dim=-1).numpy()
    for i in range(d_sae):
        expected = sorted((j for j in range(d_sae) if j != i), key=lambda j: -cosine[i, j])[:n]
        assert [f for f in found.features[i].tolist() if f >= 0] == expected
        np.testing.assert_allclose(found.scores[i][: len(expected)], cosine[i][expected], rtol=1e-5, atol=1e-6)


def test_equal_neighbours_come_by_number(monkeypatch):
    W_dec = torch.ones(6, 2)
    found = neighbours.by_cosine(W_dec, n=3)
    assert found.features.tolist() == [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2], [0, 1, 2], [0, 1, 2]]


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 40))
def test_blocks_change_nothing(block):
    rng = np.random.default_rng(0)
    W_dec, fires = torch.randn(11, 4, generator=torch.Generator().manual_seed(0)), rng.random((60, 11)) < 0.4
    codes = codes_of(fires)
    with pytest.MonkeyPatch.context() as patch:
        expected = neighbours.by_cosine(W_dec, n=3), neighbours.by_coactivation(codes, np.arange(60), n=3)
        patch.setattr(neighbours, "_BLOCK_SCORES", block)
        found = neighbours.by_cosine(W_dec, n=3), neighbours.by_coactivation(codes, np.arange(60), n=3)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_array_equal(a.features, b.features)
        np.testing.assert_allclose(a.scores, b.scores, rtol=1e-5)


def test_a_sample_of_positions_stands_for_too_many(monkeypatch):
    fires = np.random.default_rng(0).random((4000, 6)) < 0.5
    codes = codes_of(fires)
    monkeypatch.setattr(neighbours, "MAX_PRODUCTS", int((fires.sum(1) ** 2).sum() // 4))
    sample = neighbours.coactivation_sample(codes, np.arange(4000), seed=0)
    assert 800 < len(sample) < 1200
    elsewhere = neighbours.coactivation_sample(codes, np.arange(4000) + 10**6, seed=0)
    assert elsewhere.tolist() != sample.tolist()  # the choice belongs to the place in the store
    assert neighbours.coactivation_sample(codes, np.arange(4000), seed=0).tolist() == sample.tolist()
    few = neighbours.by_coactivation(codes, sample, n=5)
    np.testing.assert_allclose(few.scores, 1 / 3, atol=0.06)  # independent halves: P(both) / P(either) = 1/4 / 3/4
