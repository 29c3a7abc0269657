"""autoencode_topk: one differentiable step equals its two halves, and dense float64 autograd."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saelab_kernels import autoencode, autoencode_topk, encode_topk, sparse_decode

SHAPES = [(1, 33, 129, 5), (7, 33, 400, 5), (64, 48, 600, 32), (3, 8, 12, 12)]


def autoencoder(width: int, n_features: int, *, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(width)
    W = F.normalize(torch.randn(2, n_features, width, generator=generator, dtype=dtype), dim=2)
    b_enc = 0.1 * torch.randn(n_features, generator=generator, dtype=dtype)
    b_dec = torch.randn(width, generator=generator, dtype=dtype)
    return [W[0], b_enc, W[1], b_dec]


def grads(path: str, x: torch.Tensor, weights: list[torch.Tensor], k: int, monkeypatch) -> list[torch.Tensor]:
    """Gradients to x and all weights of a loss on both the reconstruction and the activations."""
    monkeypatch.setenv("SAELAB_KERNELS", path)
    leaves = [t.detach().clone().requires_grad_() for t in (x, *weights)]
    out = autoencode_topk(*leaves, k)
    ((out.recon - 0.5 * x).pow(2).sum() + out.top_acts.sin().sum()).backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_gradients_agree_with_dense_autograd_in_float64(n_tokens, width, n_features, k, monkeypatch):
    x, weights = torch.randn(n_tokens, width), autoencoder(width, n_features)
    exact = grads("reference", x.double(), [w.double() for w in weights], k, monkeypatch)
    for ours, expected in zip(grads("cpu", x, weights, k, monkeypatch), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=2e-5, atol=2e-5)


def test_gradients_pass_gradcheck(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    x, weights = torch.randn(4, 6, dtype=torch.float64), autoencoder(6, 30, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, *weights)]
    assert torch.autograd.gradcheck(lambda *args: autoencode_topk(*args, 5)[:2], leaves)


def test_gradients_by_hand(monkeypatch):
    """One token (2, 1), b_dec (1, 0): centred (1, 1); feature 0 reads 3 and writes (1, 0), so recon is (4, 0)."""
    for path in ("cpu", "reference"):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        x = torch.tensor([[2.0, 1.0]], requires_grad=True)
        W_enc = torch.tensor([[1.0, 2.0], [0.0, 1.0]], requires_grad=True)
        b_enc = torch.zeros(2, requires_grad=True)
        W_dec = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        b_dec = torch.tensor([1.0, 0.0], requires_grad=True)
        out = autoencode_topk(x, W_enc, b_enc, W_dec, b_dec, 1)
        assert out.recon.tolist() == [[4.0, 0.0]]
        (out.recon @ torch.tensor([1.0, 10.0])).backward()
        assert W_dec.grad.tolist() == [[3.0, 30.0], [0.0, 0.0]]  # activation 3 times the gradient (1, 10)
        assert W_enc.grad.tolist() == [[1.0, 1.0], [0.0, 0.0]]  # (1, 10) . (1, 0) = 1 times the centred token
        assert b_enc.grad.tolist() == [1.0, 0.0]
        assert x.grad.tolist() == [[1.0, 2.0]]
        assert b_dec.grad.tolist() == [0.0, 8.0]  # output side (1, 10) minus input side (1, 2)


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_the_step_equals_its_two_halves(path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, (W_enc, b_enc, W_dec, b_dec) = torch.randn(30, 24), autoencoder(24, 300)
    out, top = autoencode_topk(x, W_enc, b_enc, W_dec, b_dec, 8), encode_topk(x - b_dec, W_enc, b_enc, 8)
    assert torch.equal(out.top_indices, top.top_indices)
    assert torch.equal(out.top_acts, top.top_acts)
    assert torch.equal(out.recon, sparse_decode(*top, W_dec, b_dec))


def test_the_pairs_are_sorted_once(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    sorts, sort = [], autoencode.pairs_by_feature
    monkeypatch.setattr(autoencode, "pairs_by_feature", lambda *args: sorts.append(1) or sort(*args))
    grads("cpu", torch.randn(9, 24), autoencoder(24, 300), 4, monkeypatch)
    assert len(sorts) == 1


def test_two_training_steps_are_bitwise_equal(monkeypatch):
    x, weights = torch.randn(200, 24), autoencoder(24, 300)
    first, second = (grads("cpu", x, weights, 8, monkeypatch) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_loss_on_the_activations_alone_has_gradients(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    x, weights = torch.randn(5, 24), [w.requires_grad_() for w in autoencoder(24, 300)]
    autoencode_topk(x, *weights, 4).top_acts.sum().backward()
    assert weights[0].grad.any()
    assert not weights[2].grad.any()


@pytest.mark.parametrize("path", ["cpu", "reference"])
def test_not_a_number_reaches_the_loss(path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    x, weights = torch.randn(5, 24), autoencoder(24, 300)
    x[3, 7] = float("nan")
    out = autoencode_topk(x, *weights, 4)
    assert out.recon.isnan().any(1).tolist() == [False, False, False, True, False]


def test_it_runs_under_inference_mode(monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")
    weights = [w.requires_grad_() for w in autoencoder(24, 300)]
    with torch.inference_mode():
        assert not autoencode_topk(torch.randn(5, 24), *weights, 4).recon.requires_grad


def test_a_decoder_of_another_shape_is_refused():
    W_enc, b_enc, W_dec, b_dec = autoencoder(24, 300)
    with pytest.raises(ValueError, match=r"W_dec must have shape \[300, 24\], got \[299, 24\]"):
        autoencode_topk(torch.randn(5, 24), W_enc, b_enc, W_dec[1:], b_dec, 4)
