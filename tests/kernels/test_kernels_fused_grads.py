"""The Triton kernels of feature_grad and feature_sum, above all where features are cut into segments."""

from __future__ import annotations

import importlib

import pytest
import torch

from saelab_kernels import Pairs, Ragged, feature_grad, feature_sum, pairs_by_feature, ragged_pairs

pytestmark = pytest.mark.fused

#: pairs of each feature: none, one segment of 4 exactly, one more, several, and borders that meet a segment's
COUNTS = [[0, 4, 5, 0, 9, 1, 13, 3, 0], [5], [8, 8], [1, 17, 2, 5, 5, 0], [4, 5, 4, 7, 30], [3, 2, 3]]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture
def fused():
    return importlib.import_module("saelab_kernels.grads.fused")


@pytest.fixture
def short_segments(fused, monkeypatch):
    monkeypatch.setattr(fused, "SEGMENT", 4)
    monkeypatch.setattr(fused, "CHUNK", 4)


def pairs_of(counts: list[int], n_tokens: int, device: str) -> Pairs:
    n_pairs = sum(counts)
    starts = torch.tensor([0, *counts]).cumsum(0)
    return Pairs(*(t.to(device) for t in (torch.randperm(n_pairs), torch.randint(n_tokens, (n_pairs,)), starts)))


def summed(pairs: Pairs, values, vectors):
    """The definition in float64 on the CPU, feature by feature."""
    tokens, starts, values, vectors = (t.cpu() for t in (pairs.tokens, pairs.starts, values, vectors))
    rows = [values[low:high].double() @ vectors[tokens[low:high]].double() for low, high in starts.unfold(0, 2, 1)]
    return torch.stack(rows)


def random(*shape, dtype, device):
    return torch.randn(*shape).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 33])
@pytest.mark.parametrize("counts", COUNTS)
def test_sums_over_pairs_agree_with_float64_however_features_are_cut(
    counts, width, dtype, device, fused, short_segments, relative_rms, tolerance
):
    check_sums(pairs_of(counts, 6, device), 6, width, dtype, device, fused, relative_rms, tolerance[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
def test_sums_over_pairs_agree_with_float64_across_tiles(dtype, device, fused, relative_rms, tolerance):
    check_sums(pairs_of([3, 0, 11], 6, device), 6, 300, dtype, device, fused, relative_rms, tolerance[torch.float32])


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [768, 1000, 2304])
def test_sums_over_pairs_agree_with_float64_at_real_size(width, dtype, device, fused, relative_rms, tolerance):
    counts = [*torch.randint(0, 40, (4096,)).tolist(), 8192, 1025, 1024, 5000]
    check_sums(pairs_of(counts, 8192, device), 8192, width, dtype, device, fused, relative_rms, 3e-6)


def check_sums(pairs, n_tokens, width, dtype, device, fused, relative_rms, tolerance):
    a, p = (torch.randn(len(pairs.tokens), device=device) for _ in range(2))
    g, x = (random(n_tokens, width, dtype=dtype, device=device) for _ in range(2))
    alone, both = fused.weighted_sums(pairs, a, g), fused.two_weighted_sums(pairs, a, g, p, x)
    assert torch.equal(alone, both.W_dec)
    assert relative_rms(both.W_dec, summed(pairs, a, g)) < tolerance
    assert relative_rms(both.W_enc, summed(pairs, p, x)) < tolerance
    assert relative_rms(both.b_enc, summed(pairs, p, torch.ones(n_tokens, 1))[:, 0]) < tolerance
    assert all(map(torch.equal, both, fused.two_weighted_sums(pairs, a, g, p, x)))


def test_numbers_that_need_no_rounding_add_up_exactly(device, fused, short_segments):
    pairs = pairs_of(COUNTS[0], 6, device)
    values, vectors = (torch.randint(-9, 10, shape).float().to(device) for shape in ((35,), (6, 20)))
    assert torch.equal(fused.weighted_sums(pairs, values, vectors).double().cpu(), summed(pairs, values, vectors))


def test_gradients_from_activations_agree_with_float64(device, relative_rms, tolerance):
    indices = torch.stack([torch.randperm(40)[:5] for _ in range(7)]).to(device)
    coefficients, vectors = torch.randn(7, 5, device=device), torch.randn(7, 12, device=device)
    pairs = pairs_by_feature(indices, 40)
    dense = torch.zeros(7, 40, dtype=torch.float64).scatter_(1, indices.cpu(), coefficients.cpu().double())
    grad, total = feature_grad(pairs, coefficients, vectors), feature_sum(pairs, coefficients)
    assert relative_rms(grad, dense.T @ vectors.cpu().double()) < tolerance[torch.float32]
    assert relative_rms(total, dense.sum(0)) < tolerance[torch.float32]
    unused = pairs.starts.diff() == 0
    assert unused.any()
    assert not grad[unused].any()
    assert not total[unused].any()


def test_gradients_of_a_ragged_batch_agree_with_float64(device, relative_rms, tolerance):
    features = torch.tensor([0, 3, 2, 0, 1, 3], device=device)
    active = Ragged(torch.randn(6, device=device), features, torch.tensor([0, 2, 2, 3, 6], device=device))
    vectors = torch.randn(4, 12, device=device)
    dense = torch.zeros(4, 5, dtype=torch.float64)
    dense[active.tokens.cpu(), features.cpu()] = active.acts.cpu().double()
    grad = feature_grad(ragged_pairs(active, 5), active.acts, vectors)
    assert relative_rms(grad, dense.T @ vectors.cpu().double()) < tolerance[torch.float32]


@pytest.mark.parametrize("n_tokens", [70, pytest.param(20_000, marks=pytest.mark.gpu)])
def test_a_feature_that_fires_on_every_token_is_summed_in_full(n_tokens, device, fused, monkeypatch):
    monkeypatch.setattr(fused, "SEGMENT", min(fused.SEGMENT, n_tokens // 3))
    indices = torch.tensor([[1, 2]], device=device).repeat(n_tokens, 1)
    ones = torch.ones(n_tokens, 2, device=device)
    pairs = pairs_by_feature(indices, 400)
    assert feature_grad(pairs, ones, ones)[:4].tolist() == [[0, 0], [n_tokens] * 2, [n_tokens] * 2, [0, 0]]
    assert feature_sum(pairs, ones)[:4].tolist() == [0, n_tokens, n_tokens, 0]


def test_not_a_number_spoils_the_features_of_its_token_only(device, fused, short_segments):
    pairs = pairs_of([5, 2, 3], 6, device)._replace(tokens=torch.tensor([0, 1, 2, 3, 5, 0, 4, 1, 2, 3], device=device))
    vectors = torch.randn(6, 3, device=device)
    vectors[4] = float("nan")
    grad = fused.weighted_sums(pairs, torch.ones(10, device=device), vectors)
    assert grad.isnan().any(1).tolist() == [False, True, False]


def test_no_pairs_make_zeros(device, fused):
    pairs = pairs_of([0, 0, 0], 1, device)
    nothing, vectors = torch.empty(0, device=device), torch.randn(2, 3, device=device)
    found = fused.two_weighted_sums(pairs, nothing, vectors, nothing, vectors)
    assert [tensor.tolist() for tensor in found] == [[[0.0] * 3] * 3, [[0.0] * 3] * 3, [0.0] * 3]
