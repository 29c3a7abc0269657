"""The Triton kernels of sparse_decode, sampled_dot and decode_loss against their definitions in float64."""

from __future__ import annotations

import pytest
import torch

from saelab_kernels import decode_loss, sampled_dot, sparse_decode
from saelab_kernels.decode_loss import reference as loss_reference

pytestmark = pytest.mark.fused

SHAPES = [(1, 1, 1, 1), (1, 7, 129, 5), (3, 33, 100, 7), (2, 300, 40, 40), (2, 16, 500, 129)]
# numpy, which computes for the interpreter, warns of 0 * inf in lanes that are masked
quiet = pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
REAL = (512, 2304, 65_536, 64)
DTYPES = [torch.float32, torch.bfloat16]


def codes(n_tokens: int, n_features: int, k: int, device: str):
    indices = torch.stack([torch.randperm(n_features)[:k] for _ in range(n_tokens)])
    return torch.rand(n_tokens, k).to(device), indices.to(device)


def decoded(acts, indices, W_dec):
    """The definition in float64 on the CPU, token by token: no dense activations."""
    acts, indices, W_dec = acts.cpu().double(), indices.cpu(), W_dec.cpu()
    return torch.stack([row @ W_dec[features].double() for row, features in zip(acts, indices, strict=True)])


def dotted(vectors, weights, indices):
    vectors, weights = vectors.cpu().double(), weights.cpu()
    return torch.stack([weights[features].double() @ x for x, features in zip(vectors, indices.cpu(), strict=True)])


def random(*shape, dtype, device):
    return torch.randn(*shape).to(dtype).to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_decoding_and_dots_agree_with_float64(n_tokens, width, n_features, k, dtype, device, relative_rms, tolerance):
    check_decoding_and_dots(n_tokens, width, n_features, k, dtype, device, relative_rms, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_decoding_and_dots_agree_with_float64_at_real_size(dtype, device, relative_rms, tolerance):
    check_decoding_and_dots(*REAL, dtype, device, relative_rms, tolerance)


def check_decoding_and_dots(n_tokens, width, n_features, k, dtype, device, relative_rms, tolerance):
    acts, indices = codes(n_tokens, n_features, k, device)
    W, x = random(n_features, width, dtype=dtype, device=device), random(n_tokens, width, dtype=dtype, device=device)
    recon, dots = sparse_decode(acts, indices, W), sampled_dot(x, W, indices)
    assert recon.dtype == dots.dtype == torch.float32
    assert relative_rms(recon, decoded(acts, indices, W)) < tolerance[torch.float32]
    assert relative_rms(dots, dotted(x, W, indices)) < tolerance[torch.float32]
    assert torch.equal(recon, sparse_decode(acts, indices, W))
    assert torch.equal(dots, sampled_dot(x, W, indices))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_different_lengths_are_rows_of_equal_length_cut_short(dtype, device):
    from saelab_kernels.decode import fused as decode
    from saelab_kernels.dots import fused as dots

    acts, indices = codes(4, 60, 11, device)
    W, x = random(60, 40, dtype=dtype, device=device), random(4, 40, dtype=dtype, device=device)
    lengths = [3, 0, 11, 9]
    offsets = torch.tensor([0, *lengths], device=device).cumsum(0)
    features = torch.cat([row[:n] for row, n in zip(indices, lengths, strict=True)])
    values = torch.cat([row[:n] for row, n in zip(acts, lengths, strict=True)])
    kept = torch.arange(11, device=device) < torch.tensor(lengths, device=device)[:, None]

    assert torch.equal(decode.ragged_decode(offsets, features, values, W), sparse_decode(acts * kept, indices, W))
    assert torch.equal(dots.ragged_dot(x, W, offsets, features), sampled_dot(x, W, indices)[kept])


def test_rows_are_added_in_the_order_of_the_slots(device):
    acts, indices = torch.ones(1, 19, device=device), torch.arange(19, device=device)[None]
    W = torch.randn(19, 3, device=device)
    expected = torch.zeros(3, device=device)
    for row in W:
        expected += row
    assert torch.equal(sparse_decode(acts, indices, W)[0], expected)


@pytest.mark.parametrize("width", [33, 300])
def test_a_dot_product_does_not_depend_on_what_surrounds_it(width, device):
    _, indices = codes(5, 60, 9, device)
    W, x = torch.randn(60, width, device=device), torch.randn(5, width, device=device)
    whole = sampled_dot(x, W, indices)
    assert torch.equal(sampled_dot(x[3:4], W, indices[3:4]), whole[3:4])  # memory that is not aligned, at width 33
    assert torch.equal(sampled_dot(x, W, indices.flip(1)), whole.flip(1))
    assert torch.equal(sampled_dot(x, W, indices[:, 2:4]), whole[:, 2:4])


def test_gradients_of_decoding_are_those_of_the_definition(device, relative_rms, tolerance):
    acts, indices = codes(3, 50, 6, device)
    W_dec, b_dec, grad = torch.randn(50, 9), torch.randn(9), torch.randn(3, 9)
    leaves = [t.double().cpu().requires_grad_() for t in (acts, W_dec, b_dec)]
    dense = torch.zeros(3, 50, dtype=torch.float64).scatter_add(1, indices.cpu(), leaves[0])
    (dense @ leaves[1] + leaves[2]).backward(grad.double())

    ours = [t.to(device).requires_grad_() for t in (acts, W_dec, b_dec)]
    sparse_decode(ours[0], indices, ours[1], ours[2]).backward(grad.to(device))
    for leaf, right in zip(ours, leaves, strict=True):
        assert relative_rms(leaf.grad, right.grad) < tolerance[torch.float32]


def test_weights_in_bfloat16_get_a_gradient_in_bfloat16(device, relative_rms, tolerance):
    acts, indices = codes(3, 50, 6, device)
    W_dec = torch.randn(50, 9, device=device).bfloat16().requires_grad_()
    sparse_decode(acts, indices, W_dec).sum().backward()
    assert W_dec.grad.dtype == torch.bfloat16
    dense = torch.zeros(3, 50, device=device).scatter_(1, indices, acts)
    assert relative_rms(W_dec.grad, dense.sum(0)[:, None].expand(-1, 9)) < tolerance[torch.bfloat16]


def test_an_index_that_repeats_in_a_row_counts_twice(device):
    recon = sparse_decode(
        torch.tensor([[1.0, 2.0]], device=device), torch.tensor([[1, 1]], device=device), torch.eye(2, device=device)
    )
    assert recon.tolist() == [[0.0, 3.0]]


@quiet
def test_not_a_number_spoils_its_own_token_only(device):
    acts, indices = codes(4, 60, 3, device)
    acts[1, 2] = float("nan")
    W, x = torch.randn(60, 6, device=device), torch.randn(4, 6, device=device)
    x[2, 0] = float("inf")
    assert sparse_decode(acts, indices, W).isnan().any(1).tolist() == [False, True, False, False]
    assert sampled_dot(x, W, indices).isfinite().all(1).tolist() == [True, True, False, True]


def test_nothing_comes_of_empty_batches_and_zeros_of_tokens_without_features(device):
    W = torch.randn(60, 6, device=device)
    nothing = torch.empty(0, 3, device=device)
    assert sparse_decode(nothing, nothing.long(), W).shape == (0, 6)
    assert sampled_dot(torch.randn(0, 6, device=device), W, nothing.long()).shape == (0, 3)
    no_slots = torch.empty(2, 0, device=device)
    assert sparse_decode(no_slots, no_slots.long(), W).tolist() == [[0.0] * 6] * 2
    assert not sparse_decode(torch.zeros(1, 2, device=device), torch.tensor([[3, 4]], device=device), W).any()


def test_float64_is_computed_in_float64(device):
    acts, indices = codes(2, 60, 3, device)
    W = torch.randn(60, 6, device=device, dtype=torch.float64)
    assert sparse_decode(acts, indices, W).dtype == torch.float64
    assert sampled_dot(W[:2], W, indices).dtype == torch.float64
    assert decode_loss(acts, indices, W, W[0], W[:2]).loss.dtype == torch.float64


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefixes", [1, 3])
@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_the_loss_agrees_with_float64(
    n_tokens, width, n_features, k, n_prefixes, dtype, device, relative_rms, tolerance
):
    check_loss(n_tokens, width, n_features, k, n_prefixes, dtype, device, relative_rms, tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n_prefixes", [1, 3])
@pytest.mark.parametrize("shape", [(256, 2304, 16_384, 64), (256, 768, 65_536, 256), (128, 4096, 16_384, 20)])
def test_the_loss_agrees_with_float64_at_real_size(shape, n_prefixes, dtype, device, relative_rms, tolerance):
    check_loss(*shape, n_prefixes, dtype, device, relative_rms, tolerance)


def check_loss(n_tokens, width, n_features, k, n_prefixes, dtype, device, relative_rms, tolerance):
    acts, indices = codes(n_tokens, n_features, k, device)
    W, target = (
        random(n_features, width, dtype=dtype, device=device),
        random(n_tokens, width, dtype=dtype, device=device),
    )
    b_dec = torch.randn(width, device=device)
    ends = (n_features,)
    if n_prefixes > 1:
        ends = tuple(sorted({max(1, n_features // 7), max(1, n_features // 2), n_features}))
    found = decode_loss(acts, indices, W, b_dec, target, prefix_ends=ends)
    wide = (acts.double(), indices, W.double(), b_dec.double(), target.double())
    for ours, right in zip(found, loss_reference.decode_loss(*wide, ends), strict=True):
        assert ours.dtype == torch.float32
        assert relative_rms(ours, right) < tolerance[torch.float32]
    assert all(map(torch.equal, found, decode_loss(acts, indices, W, b_dec, target, prefix_ends=ends)))


@quiet
@pytest.mark.parametrize("ends", [None, (20, 60)])
def test_not_a_number_spoils_the_loss_of_its_own_token_only(ends, device):
    acts, indices = codes(4, 60, 3, device)
    W, b_dec, target = (torch.randn(*shape, device=device) for shape in ((60, 6), (6,), (4, 6)))
    acts[1, 2], target[3, 0] = float("nan"), float("inf")
    found = decode_loss(acts, indices, W, b_dec, target, prefix_ends=ends)
    assert found.loss.isfinite().tolist() == [True, False, True, False]
    assert found.error.isfinite().all(-1).view(-1, 4).all(0).tolist() == [True, False, True, False]


@pytest.mark.parametrize("ends", [None, (20, 60)])
def test_the_loss_of_nothing_is_nothing_and_without_features_that_of_the_bias(ends, device):
    W, b_dec, target = (torch.randn(*shape, device=device) for shape in ((60, 6), (6,), (4, 6)))
    none = torch.empty(4, 0, device=device)
    found = decode_loss(none, none.long(), W, b_dec, target, prefix_ends=ends)
    torch.testing.assert_close(found.loss, len(ends or (60,)) * (b_dec - target).pow(2).sum(1))
    empty = torch.empty(0, 3, device=device)
    assert not decode_loss(empty, empty.long(), W, b_dec, target[:0], prefix_ends=ends).loss.numel()
