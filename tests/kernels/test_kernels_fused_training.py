"""A whole training step on the fused path, and every encoder through its public function."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from saelab_kernels import (
    AdamSettings,
    Layer,
    RowGrads,
    autoencode_topk,
    aux_dead,
    batchtopk_gradient,
    dispatch,
    encode_above,
    encode_batchtopk,
    encode_jumprelu,
    encode_topk,
    feature_step,
    ragged_decode,
    ragged_dot,
    topk_gradient,
)

pytestmark = pytest.mark.fused


def problem(device: str, n_tokens: int = 6, width: int = 20, n_features: int = 70, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n_tokens, width, generator=generator).to(device, dtype)
    W_dec = F.normalize(torch.randn(n_features, width, generator=generator), dim=1)
    W_enc = W_dec + 0.1 * torch.randn(n_features, width, generator=generator)
    b_enc, b_dec = 0.1 * torch.randn(n_features, generator=generator), 0.1 * torch.randn(width, generator=generator)
    return x, Layer(*(part.to(device, dtype) for part in (W_enc, W_dec, b_enc, b_dec)))


def zeros(layer: Layer) -> Layer:
    return Layer(*(torch.zeros_like(part) for part in layer))


@pytest.mark.parametrize("gradient", [topk_gradient, batchtopk_gradient])
@pytest.mark.parametrize("clip_norm", [None, 0.01])
def test_two_steps_follow_the_definition_and_repeat_to_the_bit(gradient, clip_norm, device, monkeypatch):
    monkeypatch.setattr(dispatch, "bfloat16_units", lambda _: False)  # AuxK in float32, as the definition has it

    def two_steps(path: str, dtype: torch.dtype) -> list[torch.Tensor]:
        monkeypatch.setenv("SAELAB_KERNELS", path)
        x, layer = problem(device, dtype=dtype)
        means, squares = zeros(layer), zeros(layer)
        rows = torch.tensor([3, 37, 69], device=device)
        for step in (1, 2):
            found = gradient(x * step, layer, 4)
            revived = aux_dead(rows, -found.error, found.sparse.centred, layer.W_enc, layer.b_enc, layer.W_dec, 2)
            extra = RowGrads(rows, revived.W_enc_grad, revived.W_dec_grad)
            adam = AdamSettings(lr=1e-2, step=step, clip_norm=clip_norm, eps=1e-4)
            feature_step(layer, means, squares, found.sparse._replace(extra=extra), adam)
        return [*layer, *means, *squares]

    first, second = (two_steps("fused", torch.float32) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    for ours, theirs in zip(first, two_steps("reference", torch.float64), strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-3, atol=1e-5)


def test_the_encoders_find_what_the_definitions_say(device, monkeypatch):
    def found(path: str) -> list[torch.Tensor]:
        monkeypatch.setenv("SAELAB_KERNELS", path)
        x, layer = problem(device)
        floor = torch.full((70,), 0.5, device=device)
        top = encode_topk(x, layer.W_enc, layer.b_enc, 5)
        above = encode_above(x, layer.W_enc, layer.b_enc, floor)
        batch = encode_batchtopk(x, layer.W_enc, layer.b_enc, 3)
        jump = encode_jumprelu(x, layer.W_enc, layer.b_enc, floor, bandwidth=0.2)
        dots = ragged_dot(x, layer.W_dec, batch)
        return [*top, *above, *batch, *jump.active, jump.pre_acts, jump.step, dots, ragged_decode(above, layer.W_dec)]

    for ours, theirs in zip(found("fused"), found("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_autograd_through_the_fused_path_agrees_with_the_definition(device, monkeypatch):
    def gradients(path: str) -> list[torch.Tensor]:
        monkeypatch.setenv("SAELAB_KERNELS", path)
        x, layer = problem(device)
        leaves = [part.clone().requires_grad_() for part in (x, layer.W_enc, layer.b_enc, layer.W_dec, layer.b_dec)]
        out = autoencode_topk(*leaves, 4)
        ((out.recon - x).pow(2).sum() + out.top_acts.sum()).backward()
        return [leaf.grad for leaf in leaves]

    for ours, theirs in zip(gradients("fused"), gradients("reference"), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
