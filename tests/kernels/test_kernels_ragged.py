"""Ragged batches: sorting, dot products and decoding of pairs when tokens have different numbers of them."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels import Ragged, pairs_by_feature, ragged_decode, ragged_dot, ragged_pairs
from saelab_kernels.dots import cpu as dots


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")


def ragged(n_tokens: int, n_features: int, most: int) -> Ragged:
    counts = torch.randint(0, most + 1, (n_tokens,))
    features = torch.cat([torch.randperm(n_features)[:count].sort().values for count in counts])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    return Ragged(torch.randn(len(features)), features, offsets)


@pytest.mark.parametrize("n_features", [1, 300, 2**16, 2**16 + 1, 200_000])
def test_pairs_are_sorted_by_feature_and_then_by_token(n_features):
    active = ragged(50, n_features, min(n_features, 40))
    pairs = ragged_pairs(active, n_features)
    features = active.features[pairs.order]
    assert (features.diff() >= 0).all()
    assert (pairs.tokens.diff()[features.diff() == 0] > 0).all()
    assert torch.equal(pairs.starts.diff(), torch.bincount(active.features, minlength=n_features))
    assert torch.equal(active.tokens[pairs.order], pairs.tokens)


def test_a_topk_batch_is_the_ragged_batch_of_equal_rows():
    top_indices = torch.stack([torch.randperm(60)[:4].sort().values for _ in range(20)])
    same = Ragged(torch.ones(80), top_indices.flatten(), torch.arange(21) * 4)
    for ours, theirs in zip(ragged_pairs(same, 60), pairs_by_feature(top_indices, 60), strict=True):
        assert torch.equal(ours, theirs)


def test_dot_products_have_the_same_bits_token_by_token_and_feature_by_feature(monkeypatch):
    active, vectors, weights = ragged(70, 400, 30), torch.randn(70, 33), torch.randn(400, 33)
    by_token = ragged_dot(vectors, weights, active)
    monkeypatch.setattr(dots, "_CACHED_BYTES", 0)
    monkeypatch.setattr(dots, "_BLOCK_BYTES", 33 * 4 * 16)
    assert torch.equal(ragged_dot(vectors, weights, active), by_token)
    expected = (vectors.double() @ weights.double().T)[active.tokens, active.features]
    torch.testing.assert_close(by_token.double(), expected, rtol=1e-5, atol=1e-5)


def test_decoding_adds_the_rows_of_each_tokens_own_features():
    active, W_dec, b_dec = ragged(30, 200, 9), torch.randn(200, 17), torch.randn(17)
    dense = torch.zeros(30, 200)
    dense[active.tokens, active.features] = active.acts
    torch.testing.assert_close(ragged_decode(active, W_dec, b_dec), dense @ W_dec + b_dec, rtol=1e-5, atol=1e-5)


def test_features_out_of_range_are_refused():
    active = ragged(5, 10, 3)
    with pytest.raises(ValueError, match=r"must lie in 0..0"):
        ragged_pairs(active, 1)
    with pytest.raises(ValueError, match=r"vectors must have shape \[5, 4\]"):
        ragged_dot(torch.ones(6, 4), torch.ones(10, 4), active)
