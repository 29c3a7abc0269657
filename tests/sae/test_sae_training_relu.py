"""The ReLU SAE: its warm-up, and the two ways of computing its loss."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae import affine
from saelab.sae.architectures import new_sae
from saelab.sae.progress import annealed, warmed_up
from saelab.sae.relu import ReLUConfig

D_IN, D_SAE = 12, 200


def make(config: ReLUConfig, *, b_enc: float = 0.0):
    sae = new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        sae.b_enc.fill_(b_enc)
        if config.b_dec == "learned":
            sae.b_dec.copy_(torch.randn(D_IN))
        if config.weight_l1_by_decoder_norm:
            sae.W_dec.mul_(torch.rand(D_SAE, 1) + 0.5)
    return sae


def test_a_warm_up_is_linear_and_ends_at_its_share():
    assert [warmed_up(progress, share=0.2) for progress in (0.0, 0.05, 0.1, 0.2, 0.7, 1.0)] == [0, 0.25, 0.5, 1, 1, 1]
    assert warmed_up(0.0, share=0.0) == 1.0
    assert warmed_up(0.5, share=1.0) == 0.5


def test_an_annealing_waits_and_arrives():
    assert [annealed(x, first=2.0, last=0.0, start=0.5) for x in (0.0, 0.5, 0.75, 1.0)] == [2, 2, 1, 0]


def test_the_l1_penalty_is_warmed_up_and_nothing_else_depends_on_progress():
    sae, acts = make(ReLUConfig(d_sae=D_SAE, l1_warmup_share=0.1)), torch.randn(30, D_IN, dtype=torch.float64)
    whole = sae.training_loss(acts)
    for progress, factor in ((0.0, 0.0), (0.05, 0.5), (0.1, 1.0), (0.9, 1.0)):
        losses = sae.training_loss(acts, progress=progress)
        assert losses.sparsity.item() == pytest.approx(factor * whole.sparsity.item())
        assert losses.reconstruction.item() == whole.reconstruction.item()


CONFIGS = [
    ReLUConfig(d_sae=D_SAE),
    ReLUConfig(d_sae=D_SAE, b_dec="zero"),
    ReLUConfig(d_sae=D_SAE, weight_l1_by_decoder_norm=True),
]


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
def test_both_ways_give_the_same_loss_and_gradient_as_plain_autograd(config, few, monkeypatch):
    monkeypatch.setattr(affine, "FEW", few + 1e-9)
    sae, acts = make(config, b_enc=-1.0), torch.randn(30, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts)
    losses.total.backward()
    grads = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    feature_acts = ((acts - sae.b_dec) @ sae.W_enc + sae.b_enc).relu()
    weights = sae.W_dec.norm(dim=1) if config.weight_l1_by_decoder_norm else torch.ones(D_SAE)
    error = feature_acts @ sae.W_dec + sae.b_dec - acts
    (error.pow(2).sum(1).mean() / D_IN + (feature_acts * weights).sum(1).mean() / D_IN).backward()
    for name, parameter in sae.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(grads[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}")
        else:
            assert grads[name] is None
    assert torch.equal(losses.fired, (feature_acts > 0).any(0))
    assert losses.l0.item() == pytest.approx((feature_acts > 0).sum(1).double().mean().item())


@pytest.mark.parametrize(("b_enc", "pairs"), [(-3.0, True), (0.0, False)])
def test_pairs_are_taken_where_few_features_are_active(b_enc, pairs, monkeypatch):
    calls = []
    monkeypatch.setattr("saelab.sae.firing.encode_above", lambda *a: calls.append(a) or affine_encode(*a))
    from saelab_kernels import encode_above as affine_encode

    make(ReLUConfig(d_sae=D_SAE), b_enc=b_enc).training_loss(torch.randn(100, D_IN, dtype=torch.float64))
    assert bool(calls) == pairs


@pytest.mark.parametrize("batch", [1, 7])
@pytest.mark.parametrize("b_enc", [-1e3, 0.0])
def test_silent_features_and_zero_rows_train(batch, b_enc):
    sae = make(ReLUConfig(d_sae=D_SAE), b_enc=b_enc)
    losses = sae.training_loss(torch.zeros(batch, D_IN, dtype=torch.float64))
    losses.total.backward()
    assert losses.total.isfinite()
    assert (losses.l0 > 0) == (b_enc == 0)
    assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_of_the_training_is_between_0_and_1(share):
    with pytest.raises(ConfigError, match="l1_warmup_share is a share of the training"):
        ReLUConfig(d_sae=8, l1_warmup_share=share)
