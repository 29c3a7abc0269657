"""feature_step and the gradients that feed it: the same step as autograd, torch.optim.Adam and the loop around them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saelab_kernels import (
    AdamSettings,
    Layer,
    RowGrads,
    autoencode_topk,
    batchtopk_gradient,
    encode_batchtopk,
    feature_step,
    ragged_decode,
    topk_gradient,
)
from saelab_kernels.step import cpu, reference

SHAPES = [(1, 1, 1, 1), (7, 33, 129, 5), (64, 20, 300, 12), (40, 8, 1000, 4)]


@pytest.fixture(autouse=True)
def tuned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SAELAB_KERNELS", "cpu")


def problem(n_tokens: int, width: int, n_features: int, *, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    W_dec = F.normalize(normal(n_features, width), dim=1)
    layer = Layer(W_dec + 0.1 * normal(n_features, width), W_dec, 0.1 * normal(n_features), 0.1 * normal(width))
    return normal(n_tokens, width), layer


def moments(layer: Layer) -> tuple[Layer, Layer]:
    generator = torch.Generator().manual_seed(1)
    means = Layer(*(0.01 * torch.randn(part.shape, generator=generator).to(part) for part in layer))
    squares = Layer(*(0.01 * torch.rand(part.shape, generator=generator).to(part) for part in layer))
    return means, squares


def clones(layer: Layer) -> Layer:
    return Layer(*(part.clone() for part in layer))


def through_autograd(x, layer: Layer, means: Layer, squares: Layer, k: int, extra, adam: AdamSettings, loss_of):
    """The step as torch makes it: backward, projection, clip_grad_norm_, torch.optim.Adam, normalisation."""
    parameters = Layer(*(torch.nn.Parameter(part.clone()) for part in layer))
    optimizer = torch.optim.Adam(parameters, lr=adam.lr, betas=adam.betas, eps=adam.eps)
    for parameter, mean, square in zip(parameters, means, squares, strict=True):
        optimizer.state[parameter] = {
            "step": torch.tensor(float(adam.step - 1)), "exp_avg": mean.clone(), "exp_avg_sq": square.clone(),
        }  # fmt: skip
    loss_of(x, parameters, k).backward()
    if extra is not None:
        parameters.W_enc.grad.index_add_(0, extra.rows, extra.W_enc)
        parameters.W_dec.grad.index_add_(0, extra.rows, extra.W_dec)
    with torch.no_grad():
        if adam.unit_norm:
            grad = parameters.W_dec.grad
            grad.sub_((grad * parameters.W_dec).sum(1, keepdim=True) * parameters.W_dec)
        limit = torch.inf if adam.clip_norm is None else adam.clip_norm
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        optimizer.step()
        if adam.unit_norm:
            parameters.W_dec.div_(parameters.W_dec.norm(dim=1, keepdim=True))
    return norm, parameters, [optimizer.state[parameter] for parameter in parameters]


def topk_loss(x, layer: Layer, k: int):
    return (autoencode_topk(x, layer.W_enc, layer.b_enc, layer.W_dec, layer.b_dec, k).recon - x).pow(2).mean()


def batchtopk_loss(x, layer: Layer, k: int):
    active = encode_batchtopk(x - layer.b_dec, layer.W_enc, layer.b_enc, k)
    return (ragged_decode(active, layer.W_dec, layer.b_dec) - x).pow(2).mean()


@pytest.mark.parametrize("path", ["cpu", "reference"])
@pytest.mark.parametrize("clip_norm", [None, 0.05, 1e6])
@pytest.mark.parametrize("unit_norm", [True, False])
@pytest.mark.parametrize(("n_tokens", "width", "n_features", "k"), SHAPES)
def test_a_step_is_the_one_that_torch_makes(n_tokens, width, n_features, k, unit_norm, clip_norm, path, monkeypatch):
    monkeypatch.setenv("SAELAB_KERNELS", path)
    monkeypatch.setattr(cpu, "_BLOCK_BYTES", 4 * width * 50)  # several blocks, the last one shorter
    x, layer = problem(n_tokens, width, n_features)
    means, squares = moments(layer)
    rows = torch.randperm(n_features)[: max(1, n_features // 10)]
    extra = RowGrads(rows, 0.01 * torch.randn(len(rows), width), 0.01 * torch.randn(len(rows), width))
    adam = AdamSettings(lr=1e-2, step=3, betas=(0.8, 0.95), eps=1e-6, clip_norm=clip_norm, unit_norm=unit_norm)
    norm, parameters, states = through_autograd(x, layer, means, squares, k, extra, adam, topk_loss)

    sparse = topk_gradient(x, layer, k).sparse._replace(extra=extra)
    ours = feature_step(layer, means, squares, sparse, adam)

    torch.testing.assert_close(ours, norm, rtol=1e-5, atol=1e-7)
    for ours, theirs in zip(layer, parameters, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=2e-6)
    for mean, square, state in zip(means, squares, states, strict=True):
        torch.testing.assert_close(mean, state["exp_avg"], rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(square, state["exp_avg_sq"], rtol=1e-5, atol=1e-8)
    if unit_norm:
        torch.testing.assert_close(layer.W_dec.norm(dim=1), torch.ones(n_features), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("gradient", "loss_of"), [(topk_gradient, topk_loss), (batchtopk_gradient, batchtopk_loss)])
def test_gradients_are_those_of_autograd_in_double_precision(gradient, loss_of, monkeypatch):
    x, layer = problem(30, 12, 90, dtype=torch.float64)
    parameters = Layer(*(part.clone().requires_grad_() for part in layer))
    loss = loss_of(x, parameters, 5)
    loss.backward()
    for path in ("cpu", "reference"):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        found = gradient(x, layer, 5)
        torch.testing.assert_close(found.loss, loss.detach())
        for ours, parameter in zip(reference.written_out(found.sparse), parameters, strict=True):
            torch.testing.assert_close(ours, parameter.grad)


def test_a_feature_that_never_fires_is_moved_by_its_moments_alone():
    x, layer = problem(5, 8, 400)
    means, squares = (Layer(*(torch.zeros_like(part) for part in layer)) for _ in range(2))
    gradient = topk_gradient(x, layer, 2)
    silent = torch.ones(400, dtype=torch.bool)
    silent[gradient.features.flatten()] = False
    before = clones(layer)
    feature_step(layer, means, squares, gradient.sparse, AdamSettings(lr=1e-2, step=1, unit_norm=False))
    assert silent.sum() > 300
    assert torch.equal(layer.W_enc[silent], before.W_enc[silent])
    assert torch.equal(layer.W_dec[silent], before.W_dec[silent])
    assert not torch.equal(layer.W_dec[~silent], before.W_dec[~silent])


def test_two_runs_are_equal_to_the_bit():
    results = []
    for _ in range(2):
        x, layer = problem(64, 20, 300)
        means, squares = moments(layer)
        for step in range(1, 6):
            sparse = topk_gradient(x + step, layer, 8).sparse
            feature_step(layer, means, squares, sparse, AdamSettings(lr=1e-2, step=step, clip_norm=0.1))
        results.append([*layer, *means, *squares])
    assert all(torch.equal(first, second) for first, second in zip(*results, strict=True))


def test_a_nan_in_the_gradient_is_not_hidden():
    x, layer = problem(10, 8, 40)
    means, squares = moments(layer)
    sparse = topk_gradient(x, layer, 3).sparse
    sparse.recon_grad[2, 1] = torch.nan
    norm = feature_step(layer, means, squares, sparse, AdamSettings(lr=1e-2, step=1))
    assert norm.isnan()


def test_wrong_arguments_are_refused():
    x, layer = problem(10, 8, 40)
    means, squares = moments(layer)
    sparse = topk_gradient(x, layer, 3).sparse
    with pytest.raises(ValueError, match=r"adam.step counts from 1, got 0"):
        feature_step(layer, means, squares, sparse, AdamSettings(lr=1e-2, step=0))
    with pytest.raises(ValueError, match=r"means.W_dec must have shape \[40, 8\], got \[39, 8\]"):
        short = means._replace(W_dec=means.W_dec[1:])
        feature_step(layer, short, squares, sparse, AdamSettings(lr=1e-2, step=1))


def test_copies_in_another_precision_follow_the_weights():
    x, layer = problem(10, 8, 40)
    means, squares = moments(layer)
    copies = (torch.empty(40, 8, dtype=torch.bfloat16), torch.empty(40, 8, dtype=torch.bfloat16))
    feature_step(layer, means, squares, topk_gradient(x, layer, 3).sparse, AdamSettings(lr=1e-2, step=1), copies=copies)
    assert torch.equal(copies[0], layer.W_enc.bfloat16())
    assert torch.equal(copies[1], layer.W_dec.bfloat16())
