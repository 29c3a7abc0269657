"""sparse_decode, sampled_dot, pairs_by_feature, feature_grad, feature_sum: against their definitions and by hand."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels import feature_grad, feature_sum, pairs_by_feature, sampled_dot, sparse_decode
from saelab_kernels.grads import reference as grads_reference

PATHS = ["cpu", "reference"]
SHAPES = [(1, 1, 1, 1), (1, 33, 129, 5), (7, 33, 129, 5), (64, 48, 1000, 32), (6, 16, 20, 20), (5, 3, 70_000, 4)]


@pytest.fixture(params=PATHS)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SAELAB_KERNELS", request.param)
    return request.param


def codes(n_tokens: int, n_features: int, k: int, *, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(n_tokens + k)
    indices = torch.stack([torch.randperm(n_features, generator=generator)[:k] for _ in range(n_tokens)])
    return torch.randn(n_tokens, k, generator=generator, dtype=dtype), indices


def test_decoding_by_hand(path):
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    recon = sparse_decode(torch.tensor([[3.0, 0.5]]), torch.tensor([[0, 2]]), W_dec, torch.tensor([10.0, 20.0]))
    assert recon.tolist() == [[14.0, 19.5]]


def test_sampled_dots_by_hand(path):
    W = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    assert sampled_dot(torch.tensor([[3.0, 4.0]]), W, torch.tensor([[2, 0, 2]])).tolist() == [[2.0, 3.0, 2.0]]


def test_pairs_and_their_sums_by_hand(path):
    top_indices = torch.tensor([[2, 0], [0, 2], [0, 1]])
    pairs = pairs_by_feature(top_indices, 4)
    assert pairs.starts.tolist() == [0, 3, 4, 6, 6]
    assert pairs.order.tolist() == [1, 2, 4, 5, 0, 3]  # positions in top_indices, tokens ascending within a feature
    assert pairs.tokens.tolist() == [0, 1, 2, 2, 0, 1]
    coefficients = torch.tensor([[1.0, 10.0], [100.0, 2.0], [1000.0, 5.0]])
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    assert feature_grad(pairs, coefficients, vectors).tolist() == [[1010.0, 1100.0], [5.0, 5.0], [1.0, 2.0], [0.0, 0.0]]
    assert feature_sum(pairs, coefficients).tolist() == [1110.0, 5.0, 3.0, 0.0]


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_every_sparse_operation_agrees_with_float64(n_tokens, width, n_features, k, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    top_acts, top_indices = codes(n_tokens, n_features, k)
    W, vectors = torch.randn(n_features, width), torch.randn(n_tokens, width)
    dense = torch.zeros(n_tokens, n_features, dtype=torch.float64).scatter_(1, top_indices, top_acts.double())
    pairs = pairs_by_feature(top_indices, n_features)

    close = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(sparse_decode(top_acts, top_indices, W).double(), dense @ W.double(), **close)
    torch.testing.assert_close(feature_grad(pairs, top_acts, vectors).double(), dense.T @ vectors.double(), **close)
    torch.testing.assert_close(feature_sum(pairs, top_acts).double(), dense.sum(0), **close)
    expected = (vectors.double() @ W.double().T).gather(1, top_indices)
    torch.testing.assert_close(sampled_dot(vectors, W, top_indices).double(), expected, **close)


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_the_feature_major_order_is_the_same_by_both_sorts(n_tokens, width, n_features, k, monkeypatch):
    _, top_indices = codes(n_tokens, n_features, k)
    found = []
    for path in PATHS:
        monkeypatch.setenv("SAELAB_KERNELS", path)
        found.append(pairs_by_feature(top_indices, n_features))
    for ours, reference in zip(*found, strict=True):
        assert torch.equal(ours, reference)


def test_every_pair_appears_once_and_features_never_used_get_a_zero_gradient(path):
    top_acts, top_indices = codes(50, 400, 3)
    pairs = pairs_by_feature(top_indices, 400)
    assert torch.equal(pairs.order.sort().values, torch.arange(150))
    grad = feature_grad(pairs, top_acts, torch.randn(50, 8))
    unused = torch.ones(400, dtype=torch.bool)
    unused[top_indices.flatten()] = False
    assert unused.any()
    assert not grad[unused].any()
    assert grad[~unused].any(1).all()


def test_a_feature_that_fires_on_every_token_is_summed_in_full(path):
    top_indices = torch.zeros(3000, 1, dtype=torch.int64)
    grad = feature_grad(pairs_by_feature(top_indices, 90), torch.ones(3000, 1), torch.ones(3000, 5))
    assert grad[0].tolist() == [3000.0] * 5


def test_an_index_that_repeats_in_a_row_counts_twice(path):
    top_indices = torch.tensor([[1, 1]])
    assert sparse_decode(torch.tensor([[1.0, 2.0]]), top_indices, torch.eye(2)).tolist() == [[0.0, 3.0]]


def test_two_runs_are_bitwise_equal(path):
    top_acts, top_indices = codes(300, 500, 16)
    W, vectors = torch.randn(500, 40), torch.randn(300, 40)
    pairs = pairs_by_feature(top_indices, 500)
    for operation in (
        lambda: sparse_decode(top_acts, top_indices, W),
        lambda: feature_grad(pairs, top_acts, vectors),
        lambda: feature_sum(pairs, top_acts),
        lambda: sampled_dot(vectors, W, top_indices),
    ):
        assert torch.equal(operation(), operation())


def test_decoding_passes_gradcheck(path):
    top_acts, top_indices = codes(5, 30, 4, dtype=torch.float64)
    W_dec, b_dec = torch.randn(30, 7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (top_acts, W_dec, b_dec)]
    assert torch.autograd.gradcheck(lambda acts, W, b: sparse_decode(acts, top_indices, W, b), leaves)


def test_not_a_number_spoils_its_own_token_only(path):
    top_acts, top_indices = codes(4, 60, 3)
    top_acts[1, 2] = float("nan")
    recon = sparse_decode(top_acts, top_indices, torch.randn(60, 6))
    assert recon.isnan().any(1).tolist() == [False, True, False, False]


def test_an_empty_batch_decodes_to_an_empty_one_with_zero_gradients(path):
    top_acts = torch.empty(0, 3, requires_grad=True)
    W_dec = torch.randn(60, 6, requires_grad=True)
    sparse_decode(top_acts, torch.empty(0, 3, dtype=torch.int64), W_dec).sum().backward()
    assert not W_dec.grad.any()


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"top_indices": torch.tensor([[0, 9]])}, ValueError, r"lie in 0..8, got 0..9"),
        ({"top_indices": torch.tensor([[-1, 0]])}, ValueError, r"lie in 0..8, got -1..0"),
        ({"top_indices": torch.tensor([[0, 1]], dtype=torch.int32)}, TypeError, "int64"),
        ({"top_indices": torch.tensor([0, 1])}, ValueError, r"shape \[N, k\]"),
        ({"top_acts": torch.ones(1, 3)}, ValueError, r"top_acts must have shape \[1, 2\], got \[1, 3\]"),
        ({"b_dec": torch.ones(4)}, ValueError, r"b_dec must have shape \[5\], got \[4\]"),
    ],
)
def test_bad_arguments_are_named(arguments, error, sentence):
    good = {"top_acts": torch.ones(1, 2), "top_indices": torch.tensor([[0, 1]]), "W_dec": torch.ones(9, 5)}
    with pytest.raises(error, match=sentence):
        sparse_decode(**(good | arguments))


def test_coefficients_of_another_batch_are_refused():
    pairs = pairs_by_feature(torch.tensor([[0, 1]]), 9)
    with pytest.raises(ValueError, match="one entry for each of the 2 pairs"):
        feature_grad(pairs, torch.ones(2, 2), torch.ones(2, 5))
    with pytest.raises(ValueError, match="one row for each of the 2 vectors"):
        sampled_dot(torch.ones(2, 5), torch.ones(9, 5), torch.tensor([[0, 1]]))


def test_the_reference_makes_one_row_for_each_feature():
    pairs = pairs_by_feature(torch.tensor([[0, 1]]), 9)
    assert grads_reference.weighted_sums(pairs, torch.ones(2), torch.ones(1, 5)).shape == (9, 5)
