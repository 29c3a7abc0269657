"""Losses of a training batch: by hand, against dense autograd, and what they leave alone."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae.abstopk import AbsTopKConfig
from saelab.sae.auxk import auxk_loss
from saelab.sae.base import SAE
from saelab.sae.batchtopk import BatchTopKConfig
from saelab.sae.gated import GatedConfig
from saelab.sae.io import new_sae
from saelab.sae.jumprelu import JumpReLUConfig
from saelab.sae.matching_pursuit import MatchingPursuitConfig
from saelab.sae.panneal import PAnnealConfig
from saelab.sae.relu import ReLUConfig
from saelab.sae.topk import TopKConfig
from saelab_kernels.revive import packed

D_IN, D_SAE = 12, 200
TRAINABLE = [ReLUConfig(d_sae=D_SAE), TopKConfig(d_sae=D_SAE, k=6), BatchTopKConfig(d_sae=D_SAE, k=6)]
EVERY = [
    *TRAINABLE,
    PAnnealConfig(d_sae=D_SAE),
    GatedConfig(d_sae=D_SAE),
    AbsTopKConfig(d_sae=D_SAE, k=6),
    JumpReLUConfig(d_sae=D_SAE),
    JumpReLUConfig(d_sae=D_SAE, penalty="step"),
    JumpReLUConfig(d_sae=D_SAE, penalty="quadratic", target_l0=6.0),
    MatchingPursuitConfig(d_sae=D_SAE, max_iterations=6),
]


def make(config, *, d_in: int = D_IN):
    sae = new_sae(config, d_in=d_in, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        sae.b_dec.copy_(torch.linspace(-1, 1, d_in))
        if hasattr(sae, "b_enc"):
            sae.b_enc.copy_(torch.linspace(-0.1, 0.1, len(sae.b_enc)))
    return sae


def by_hand(sae, *, encoder, W_dec, b_enc=0.0, b_dec=0.0):
    with torch.no_grad():
        sae.encoder.copy_(torch.tensor(encoder))
        sae.W_dec.copy_(torch.tensor(W_dec))
        sae.b_enc.fill_(b_enc)
        sae.b_dec.fill_(b_dec)
    return sae


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_the_reconstruction_loss_is_the_mean_squared_error_and_the_parts_add_up(config):
    sae, acts = make(config), torch.randn(30, D_IN)
    dead = torch.zeros(D_SAE, dtype=torch.bool)
    dead[:50] = True
    losses = sae.training_loss(acts, dead=dead)
    torch.testing.assert_close(losses.total, losses.reconstruction + losses.sparsity + losses.aux)
    assert losses.fired.shape == (D_SAE,)
    if config.arch != "batchtopk":  # whose training keeps the top of the batch, not what exceeds the threshold
        feature_acts = sae.encode(acts)
        torch.testing.assert_close(losses.reconstruction, (sae(acts) - acts).pow(2).sum(1).mean().detach() / D_IN)
        assert torch.equal(losses.fired, (feature_acts != 0).any(0))
        torch.testing.assert_close(losses.l0, (feature_acts != 0).sum(1).float().mean())


def test_the_l1_penalty_by_hand():
    acts = torch.tensor([[3.0, -1.0], [0.0, 2.0]])
    weights = {"encoder": [[1.0, 0.0], [0.0, 1.0]], "W_dec": [[1.0, 0.0], [0.0, 2.0]]}
    losses = by_hand(make(ReLUConfig(d_sae=2, l1_coefficient=0.5), d_in=2), **weights).training_loss(acts)
    # feature_acts (3, 0) and (0, 2); recon (3, 0) and (0, 4); squared errors 1 and 4
    assert losses.sparsity.item() == pytest.approx(0.5 * (3 + 2) / 2 / 2)
    assert losses.reconstruction.item() == pytest.approx((1 + 4) / 2 / 2)
    assert losses.l0.item() == 1.0
    config = ReLUConfig(d_sae=2, l1_coefficient=0.5, weight_l1_by_decoder_norm=True)
    weighted = by_hand(make(config, d_in=2), **weights).training_loss(acts)
    assert weighted.sparsity.item() == pytest.approx(0.5 * (3 + 4) / 2 / 2)


def test_the_auxiliary_loss_by_hand():
    sae = by_hand(
        make(TopKConfig(d_sae=3, k=1), d_in=2),
        encoder=[[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]],
        W_dec=[[1.0, 0.0], [0.5, 0.0], [0.0, 0.5]],
    )
    acts = torch.tensor([[4.0, 1.0], [0.0, 2.0]])
    residual = torch.tensor([[2.0, 1.0], [0.0, 3.0]])
    dead = torch.tensor([False, True, True])
    # both dead features: recon (2, 0.5) and (0, 1); errors 0.25 and 4; residual mean (1, 2), variance 1 + 1 + 1 + 1
    assert auxk_loss(sae, acts, residual, dead, k_aux=2).item() == pytest.approx(4.25 / 4)
    # the larger alone: recon (2, 0) and (0, 1); errors 1 and 4
    assert auxk_loss(sae, acts, residual, dead, k_aux=1).item() == pytest.approx(5 / 4)


@pytest.mark.parametrize("config", TRAINABLE[1:], ids=str)
@pytest.mark.parametrize("dead", [None, torch.zeros(D_SAE, dtype=torch.bool)])
def test_the_auxiliary_loss_is_zero_when_nothing_is_dead(config, dead):
    assert make(config).training_loss(torch.randn(30, D_IN), dead=dead).aux.item() == 0.0


@pytest.mark.parametrize("config", TRAINABLE[1:], ids=str)
def test_dead_features_are_asked_for_what_the_reconstruction_leaves_over(config):
    sae, acts, dead = make(config), torch.randn(30, D_IN), torch.arange(D_SAE) < 50
    losses = sae.training_loss(acts, dead=dead)
    pre_acts = sae.pre_acts(acts)
    of_batch = sae.decode(pre_acts * (pre_acts >= pre_acts.flatten().topk(6 * 30).values.min()))
    recon = of_batch if config.arch == "batchtopk" else sae(acts)
    expected = auxk_loss(sae, acts, acts - recon, dead, k_aux=D_IN // 2) / 32
    torch.testing.assert_close(losses.aux, expected.detach())


def test_the_auxiliary_loss_of_a_perfect_reconstruction_is_zero_not_nan():
    sae = make(TopKConfig(d_sae=D_SAE, k=6))
    with torch.no_grad():
        sae.b_enc -= 100
    loss = auxk_loss(sae, torch.randn(5, D_IN), torch.zeros(5, D_IN), torch.ones(D_SAE, dtype=torch.bool), k_aux=3)
    assert loss.item() == 0.0


def test_the_auxiliary_loss_moves_dead_rows_only_and_scales_with_its_coefficient():
    dead = torch.arange(D_SAE) < 40
    acts, grads, losses = torch.randn(30, D_IN), [], []
    for coefficient in (0.0, 1 / 32, 1 / 16):
        sae = make(TopKConfig(d_sae=D_SAE, k=6, aux_coefficient=coefficient))
        losses.append(sae.training_loss(acts, dead=dead))
        losses[-1].total.backward()
        grads.append([sae.encoder.grad, sae.W_dec.grad, sae.b_enc.grad, sae.b_dec.grad])
    assert losses[0].aux.item() == 0.0
    assert losses[2].aux.item() == pytest.approx(2 * losses[1].aux.item())
    for off, on in zip(*grads[:2], strict=True):
        changed = (off != on).flatten(1).any(1) if off.ndim > 1 else off != on
        if len(changed) == D_SAE:
            assert changed.any()
            assert not changed[~dead].any()
        else:
            assert not changed.any()  # b_dec


@pytest.mark.parametrize("arguments", [{}, {"aux_coefficient": 0.5, "k_aux": 4}, {"aux_coefficient": 0.5, "k_aux": 60}])
def test_gradients_of_the_training_loss_agree_with_dense_autograd_in_float64(arguments, monkeypatch):
    monkeypatch.setattr(packed.dispatch, "bfloat16_units", lambda _: False)  # AuxK in float32
    acts, dead = torch.randn(40, D_IN), torch.arange(D_SAE) < 50
    grads = []
    for path, dtype in (("cpu", torch.float32), ("reference", torch.float64)):
        monkeypatch.setenv("SAELAB_KERNELS", path)
        sae = make(TopKConfig(d_sae=D_SAE, k=6, **arguments)).to(dtype)
        sae.training_loss(acts.to(dtype), dead=dead).total.backward()
        grads.append({name: p.grad.double() for name, p in sae.named_parameters()})
    for name, exact in grads[1].items():
        torch.testing.assert_close(grads[0][name], exact, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


def test_the_gradient_of_b_dec_comes_from_both_sides():
    sae, acts = make(TopKConfig(d_sae=D_SAE, k=6)).double(), torch.randn(10, D_IN, dtype=torch.float64)
    sae.training_loss(acts).total.backward()
    step = 1e-6
    for j in (0, 5):
        totals = []
        for sign in (1, -1):
            with torch.no_grad():
                sae.b_dec[j] += sign * step
                totals.append(sae.training_loss(acts).total.item())
                sae.b_dec[j] -= sign * step
        assert sae.b_dec.grad[j].item() == pytest.approx((totals[0] - totals[1]) / (2 * step), rel=1e-5)


def test_the_decoder_gradient_keeps_no_part_along_its_unit_rows():
    sae = make(TopKConfig(d_sae=D_SAE, k=6))
    sae.project_decoder_grad_()  # no gradient yet: nothing to do
    sae.training_loss(torch.randn(30, D_IN)).total.backward()
    before = sae.W_dec.grad.clone()
    sae.project_decoder_grad_()
    torch.testing.assert_close((sae.W_dec.grad * sae.W_dec).sum(1), torch.zeros(D_SAE), rtol=0, atol=1e-6)
    along = (before * sae.W_dec).sum(1, keepdim=True) * sae.W_dec
    torch.testing.assert_close(sae.W_dec.grad, (before - along).detach())


def test_normalising_gives_unit_rows_and_leaves_a_row_of_zeros():
    sae = make(TopKConfig(d_sae=D_SAE, k=6))
    with torch.no_grad():
        sae.W_dec *= 3
        sae.W_dec[4] = 0
    sae.normalise_decoder_()
    norms = sae.W_dec.norm(dim=1)
    assert norms[4] == 0
    torch.testing.assert_close(norms[5:], torch.ones(D_SAE - 5))


def test_free_decoder_norms_are_neither_normalised_nor_projected():
    sae = make(ReLUConfig(d_sae=D_SAE, weight_l1_by_decoder_norm=True))
    with torch.no_grad():
        sae.W_dec *= 3
    sae.training_loss(torch.randn(30, D_IN)).total.backward()
    grad, weights = sae.W_dec.grad.clone(), sae.W_dec.detach().clone()
    sae.project_decoder_grad_()
    sae.normalise_decoder_()
    assert torch.equal(sae.W_dec.grad, grad)
    assert torch.equal(sae.W_dec, weights)


def trained(config, *, path: str = "auto", monkeypatch=None, steps: int = 60):
    if monkeypatch:
        monkeypatch.setenv("SAELAB_KERNELS", path)
    sae = make(config)
    optimizer = torch.optim.Adam([p for p in sae.parameters() if p.requires_grad], lr=3e-3, fused=True)
    generator = torch.Generator().manual_seed(9)
    losses = []
    for _ in range(steps):
        loss = sae.training_loss(torch.randn(64, D_IN, generator=generator), dead=torch.arange(D_SAE) < 20)
        loss.total.backward()
        sae.project_decoder_grad_()
        optimizer.step()
        optimizer.zero_grad()
        sae.normalise_decoder_()
        losses.append(loss.reconstruction.item())
    return sae, losses


@pytest.mark.parametrize("config", EVERY, ids=str)
def test_training_lowers_the_error_and_is_bitwise_repeatable(config):
    (first, losses), (second, _) = trained(config), trained(config)
    assert losses[-1] < 0.8 * losses[0]
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_the_sparse_and_the_dense_path_train_alike(monkeypatch):
    _, sparse = trained(TopKConfig(d_sae=D_SAE, k=6), path="cpu", monkeypatch=monkeypatch, steps=20)
    _, dense = trained(TopKConfig(d_sae=D_SAE, k=6), path="reference", monkeypatch=monkeypatch, steps=20)
    assert sparse == pytest.approx(dense, rel=1e-3)


def test_an_architecture_without_a_training_loss_says_so():
    sae = SAE(ReLUConfig(d_sae=8), 4)
    with pytest.raises(ConfigError, match="is for inference only"):
        sae.training_loss(torch.randn(3, 4))
    assert sae.training_gradient(torch.randn(3, 4)) is None
