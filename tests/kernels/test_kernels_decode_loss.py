"""decode_loss: loss, error and gradients against autograd, closed forms and each other; with and without prefixes."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels import DecodeLoss, decode_loss, feature_grad, pairs_by_feature, prefix_pairs
from saelab_kernels.decode_loss import reference

SHAPES = [(1, 1, 1, 1), (1, 33, 129, 5), (7, 33, 129, 5), (12, 48, 1000, 32), (6, 16, 20, 20)]


@pytest.fixture(params=["cpu", "reference"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("SAELAB_KERNELS", request.param)
    return request.param


def problem(n_tokens: int, width: int, n_features: int, k: int, *, dtype: torch.dtype = torch.float32):
    """top_acts, top_indices, W_dec, b_dec, target."""
    indices = torch.stack([torch.randperm(n_features)[:k] for _ in range(n_tokens)])
    W_dec, b_dec = torch.randn(n_features, width, dtype=dtype), torch.randn(width, dtype=dtype)
    return torch.rand(n_tokens, k, dtype=dtype), indices, W_dec, b_dec, torch.randn(n_tokens, width, dtype=dtype)


def doubled(tensors):
    return [t.double() if t.is_floating_point() else t for t in tensors]


def prefixes(n_features: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, n_features // 5), max(1, n_features // 2), n_features}))


def test_the_loss_by_hand(path):
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    acts, indices, target = torch.tensor([[3.0, 0.5]]), torch.tensor([[0, 2]]), torch.tensor([[3.0, 1.0]])
    loss, error, acts_grad = decode_loss(acts, indices, W_dec, torch.tensor([1.0, 2.0]), target)
    assert error.tolist() == [[2.0, 0.5]]  # reconstruction (5, 1.5)
    assert loss.tolist() == [4.25]
    assert acts_grad.tolist() == [[4.0, 7.0]]


def test_prefixes_by_hand(path):
    W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0], [2.0, -1.0]])
    acts, indices = torch.tensor([[0.5, 3.0]]), torch.tensor([[2, 0]])
    found = decode_loss(acts, indices, W_dec, torch.zeros(2), torch.ones(1, 2), prefix_ends=(1, 3))
    # features below 1 give (3, 0), an error of (2, -1); all give (4, -0.5), an error of (3, -1.5)
    assert found.loss.tolist() == [5.0 + 11.25]
    assert found.error.tolist() == [[[5.0, -2.5]], [[3.0, -1.5]]]
    assert found.acts_grad.tolist() == [[15.0, 10.0]]


def test_a_perfect_reconstruction_costs_nothing(path):
    acts, indices, W_dec, b_dec, _ = problem(5, 8, 64, 3)
    target = (acts[:, :, None] * W_dec[indices]).sum(1) + b_dec
    found = decode_loss(acts, indices, W_dec, b_dec, target)
    assert found.loss.max() < 1e-10
    assert found.acts_grad.abs().max() < 1e-4


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_every_gradient_is_that_of_autograd(shape, nested, path):
    acts, indices, W_dec, b_dec, target = problem(*shape, dtype=torch.float64)
    ends = prefixes(len(W_dec)) if nested else None
    leaves = [tensor.clone().requires_grad_() for tensor in (acts, W_dec, b_dec)]
    dense = torch.zeros(len(acts), len(W_dec), dtype=torch.float64).scatter_add(1, indices, leaves[0])
    loss = sum((dense[:, :end] @ leaves[1][:end] + leaves[2] - target).pow(2).sum(1) for end in ends or (len(W_dec),))
    loss.sum().backward()

    found = decode_loss(acts, indices, W_dec, b_dec, target, prefix_ends=ends)
    torch.testing.assert_close(found.loss, loss.detach())
    torch.testing.assert_close(found.acts_grad, leaves[0].grad)
    pairs, error = pairs_by_feature(indices, len(W_dec)), found.error
    if ends:
        pairs, error = prefix_pairs(pairs, ends, n_tokens=len(acts)), error.flatten(0, 1)
    torch.testing.assert_close(2 * feature_grad(pairs, acts, error), leaves[1].grad)
    torch.testing.assert_close(2 * (found.error[0] if ends else found.error).sum(0), leaves[2].grad)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_tuned_path_agrees_with_float64(shape, nested, monkeypatch, relative_rms):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    inputs = problem(*shape)
    ends = prefixes(shape[2]) if nested else (shape[2],)
    expected = reference.decode_loss(*doubled(inputs), ends)
    found = decode_loss(*inputs, prefix_ends=ends)
    for ours, right in zip(found, expected, strict=True):
        assert ours.dtype == torch.float32
        assert relative_rms(ours, right) < 1e-6


def test_the_reference_itself_passes_gradcheck():
    acts, indices, W_dec, b_dec, target = problem(3, 5, 12, 4, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (acts, W_dec, b_dec)]
    assert torch.autograd.gradcheck(
        lambda acts, W, b: reference.decode_loss(acts, indices, W, b, target, (3, 7, 12))[0], leaves
    )


def test_one_prefix_is_no_prefix(path):
    inputs = problem(4, 9, 60, 5)
    plain, nested = decode_loss(*inputs), decode_loss(*inputs, prefix_ends=(60,))
    assert torch.equal(plain.loss, nested.loss)
    assert torch.equal(plain.acts_grad, nested.acts_grad)
    assert torch.equal(plain.error[None], nested.error)


def test_a_prefix_without_active_features_reconstructs_the_bias(path):
    acts, _, W_dec, b_dec, target = problem(4, 9, 60, 3)
    indices = torch.tensor([[50, 51, 52]]).expand(4, -1)
    plain, nested = (decode_loss(acts, indices, W_dec, b_dec, target, prefix_ends=e) for e in (None, (50, 60)))
    torch.testing.assert_close(nested.loss, plain.loss + (b_dec - target).pow(2).sum(1))
    torch.testing.assert_close(nested.acts_grad, plain.acts_grad)


def test_an_index_that_repeats_counts_twice(path):
    rest = torch.eye(9), torch.zeros(9), torch.ones(1, 9)
    once = decode_loss(torch.tensor([[3.0]]), torch.tensor([[1]]), *rest)
    twice = decode_loss(torch.tensor([[1.0, 2.0]]), torch.tensor([[1, 1]]), *rest)
    assert torch.equal(once.loss, twice.loss)
    assert twice.acts_grad.tolist() == [[4.0, 4.0]]


@pytest.mark.parametrize("ends", [None, (20, 60)])
def test_not_a_number_spoils_its_own_token_only(path, ends):
    acts, indices, W_dec, b_dec, target = problem(4, 6, 60, 3)
    acts[1, 2], target[3, 0] = float("nan"), float("inf")
    found = decode_loss(acts, indices, W_dec, b_dec, target, prefix_ends=ends)
    assert found.loss.isfinite().tolist() == [True, False, True, False]
    assert found.error.isfinite().all(-1).view(-1, 4).all(0).tolist() == [True, False, True, False]
    assert found.acts_grad.isfinite().any(1).tolist() == [True, False, True, False] or ends  # a prefix may be spared


@pytest.mark.parametrize("ends", [None, (20, 60)])
def test_an_empty_batch_has_no_loss(path, ends):
    acts, indices, W_dec, b_dec, target = problem(2, 6, 60, 3)
    found = decode_loss(acts[:0], indices[:0], W_dec, b_dec, target[:0], prefix_ends=ends)
    assert [tensor.numel() for tensor in found] == [0, 0, 0]


def test_two_runs_are_bitwise_equal(path):
    inputs = problem(40, 24, 300, 16)
    for ends in (None, (20, 100, 300)):
        first, second = (decode_loss(*inputs, prefix_ends=ends) for _ in range(2))
        assert all(map(torch.equal, first, second))


def test_half_precision_is_computed_in_float32(path):
    acts, indices, W_dec, b_dec, target = problem(4, 6, 60, 3)
    W_dec, target = W_dec.bfloat16(), target.bfloat16()
    found = decode_loss(acts, indices, W_dec, b_dec, target)
    wide = decode_loss(acts, indices, W_dec.float(), b_dec, target.float())
    assert isinstance(found, DecodeLoss)
    assert all(map(torch.equal, found, wide))


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"prefix_ends": (3, 3, 9)}, ValueError, r"ascend from at least 1 to F=9, got \(3, 3, 9\)"),
        ({"prefix_ends": (0, 9)}, ValueError, "ascend from at least 1"),
        ({"prefix_ends": (3, 8)}, ValueError, "to F=9"),
        ({"prefix_ends": ()}, ValueError, "to F=9"),
        ({"top_indices": torch.tensor([[0, 9]])}, ValueError, r"lie in 0..8, got 0..9"),
        ({"target": torch.ones(2, 5)}, ValueError, r"target must have shape \[1, 5\], got \[2, 5\]"),
        ({"b_dec": torch.ones(4)}, ValueError, r"b_dec must have shape \[5\]"),
        ({"W_dec": torch.ones(9, 5, dtype=torch.int64)}, TypeError, "W_dec must be a floating-point tensor"),
    ],
)
def test_bad_arguments_are_named(arguments, error, sentence):
    good = {
        "top_acts": torch.ones(1, 2),
        "top_indices": torch.tensor([[0, 1]]),
        "W_dec": torch.ones(9, 5),
        "b_dec": torch.ones(5),
        "target": torch.ones(1, 5),
    }
    with pytest.raises(error, match=sentence):
        decode_loss(**(good | arguments))


def test_pairs_of_other_features_are_refused():
    with pytest.raises(ValueError, match="F=9"):
        prefix_pairs(pairs_by_feature(torch.tensor([[0, 1]]), 9), (4, 8), n_tokens=1)
