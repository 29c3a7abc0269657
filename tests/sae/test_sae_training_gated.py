"""The gated SAE: three terms by hand, gradients that stop where the paper stops them, two ways to one loss."""

from __future__ import annotations

import math

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae import affine
from saelab.sae.architectures import new_sae
from saelab.sae.gated import Gated, GatedConfig

D_IN, D_SAE = 12, 200


def small(*, l1_coefficient: float = 0.5) -> Gated:
    """Two inputs, two features: feature 0 reads the first input, feature 1 the second."""
    sae = new_sae(GatedConfig(d_sae=2, l1_coefficient=l1_coefficient), d_in=2).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64))
        sae.b_gate.copy_(torch.tensor([-1.0, 1.0]))
        sae.r_mag.copy_(torch.tensor([math.log(2.0), 0.0], dtype=torch.float64))
        sae.b_mag.copy_(torch.tensor([0.5, -2.5]))
        sae.b_dec.copy_(torch.tensor([1.0, 0.0]))
    return sae


def random_sae(*, open_share: float = 0.5) -> Gated:
    sae = new_sae(GatedConfig(d_sae=D_SAE), d_in=D_IN, generator=torch.Generator().manual_seed(3)).double()
    with torch.no_grad():
        sae.b_gate.copy_(torch.randn(D_SAE) * 0.1 - 3 * (0.5 - open_share))
        sae.r_mag.copy_(torch.randn(D_SAE) * 0.3)
        sae.b_mag.copy_(torch.randn(D_SAE) * 0.3)
        sae.b_dec.copy_(torch.randn(D_IN))
    return sae


def test_the_three_terms_by_hand():
    # x - b_dec = (2, 3), then (1, 1): projections; gates (1, 4) and (0, 2): the gate at 0 stays shut
    acts = torch.tensor([[3.0, 3.0], [2.0, 1.0]], dtype=torch.float64)
    # magnitudes: row 0: (2 * 2 + 0.5, 3 - 2.5) = (4.5, 0.5); row 1: (shut, 1 - 2.5 < 0) = (0, 0)
    assert small().encode(acts).tolist() == [[4.5, 0.5], [0.0, 0.0]]
    # recon: row 0: (1 + 2.7, 3.6 + 0.5) = (3.7, 4.1); row 1: (1, 0). errors (0.7, 1.1), (-1, -1)
    # by gate: row 0: (1 + 0.6, 0.8 + 4) = (1.6, 4.8); row 1: (1, 2). errors (-1.4, 1.8), (-1, 1)
    losses = small().training_loss(acts)
    assert losses.reconstruction.item() == pytest.approx((0.49 + 1.21 + 2) / 4)
    assert losses.aux.item() == pytest.approx((1.96 + 3.24 + 2) / 4)
    assert losses.sparsity.item() == pytest.approx(0.5 * (1 + 4 + 0 + 2) / 4)
    assert losses.total.item() == pytest.approx((3.7 + 7.2 + 3.5) / 4)
    assert losses.fired.tolist() == [True, True]
    assert losses.l0.item() == 1.0


def test_the_gradients_by_hand():
    acts = torch.tensor([[3.0, 3.0]], dtype=torch.float64)
    sae = small()
    sae.training_loss(acts).total.backward()
    # error e = (0.7, 1.1), error by gate g = (-1.4, 1.8), mean over 2 numbers: factor 2 / 2 = 1
    # dL/dW_dec = f e; nothing of the auxiliary term
    assert sae.W_dec.grad.tolist() == [pytest.approx([4.5 * 0.7, 4.5 * 1.1]), pytest.approx([0.5 * 0.7, 0.5 * 1.1])]
    # dL/df = W_dec e = (0.42 + 0.88, 1.1) = (1.3, 1.1); dL/dgate = W_dec g + 0.5 / 2 = (-0.84 + 1.44, 1.8) + 0.25
    assert sae.b_mag.grad.tolist() == pytest.approx([1.3, 1.1])
    assert sae.r_mag.grad.tolist() == pytest.approx([1.3 * 2 * 2, 1.1 * 3])  # dL/df * exp(r) * projection
    assert sae.b_gate.grad.tolist() == pytest.approx([0.85, 2.05])
    # projection: dL/df * exp(r) + dL/dgate = (2.6 + 0.85, 1.1 + 2.05), times x - b_dec
    assert sae.encoder.grad.tolist() == [pytest.approx([3.45 * 2, 3.45 * 3]), pytest.approx([3.15 * 2, 3.15 * 3])]
    # b_dec: e from the output, minus the projections' gradients through the input
    assert sae.b_dec.grad.tolist() == pytest.approx([0.7 - 3.45, 1.1 - 3.15])


@pytest.mark.parametrize("open_share", [0.02, 0.5])
def test_the_auxiliary_term_leaves_the_decoder_alone(open_share):
    sae, acts = random_sae(open_share=open_share), torch.randn(30, D_IN, dtype=torch.float64)
    with torch.no_grad():
        sae.b_mag.fill_(-1e6)  # no magnitude: all that can move the decoder is the auxiliary term
    losses = sae.training_loss(acts)
    losses.total.backward()
    assert losses.aux.item() > 0
    assert sae.encoder.grad.abs().sum() > 0
    assert not sae.W_dec.grad.any()
    # nor b_dec on the side of the output: what reaches it through the input and by the reconstruction is all there is
    through_input = -(sae.b_gate.grad @ sae.encoder)
    by_output = 2 * (sae.b_dec - acts).sum(0) / acts.numel()
    torch.testing.assert_close(sae.b_dec.grad, (through_input + by_output).detach())


def test_the_reconstruction_does_not_reach_the_gate_through_its_step():
    sae, acts = random_sae(), torch.randn(30, D_IN, dtype=torch.float64)
    with torch.no_grad():
        sae.W_dec.zero_()  # the auxiliary term is then constant in the gate
    sae.cfg = GatedConfig(d_sae=D_SAE, l1_coefficient=0.0)
    sae.training_loss(acts).total.backward()
    assert sae.b_gate.grad.abs().max() < 1e-12


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
def test_both_ways_give_the_definition_and_its_gradient(few, monkeypatch):
    monkeypatch.setattr(affine, "FEW", few + 1e-9)
    sae, acts = random_sae(open_share=0.2), torch.randn(30, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts)
    losses.total.backward()
    grads = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    gate = (acts - sae.b_dec) @ sae.W_enc + sae.b_gate
    magnitude = ((acts - sae.b_dec) @ (sae.W_enc * sae.r_mag.exp()) + sae.b_mag).relu()
    feature_acts = (gate > 0) * magnitude
    frozen = gate.relu() @ sae.W_dec.detach() + sae.b_dec.detach()
    recon = feature_acts @ sae.W_dec + sae.b_dec
    parts = (
        (recon - acts).pow(2).sum(1).mean(),
        sae.cfg.l1_coefficient * gate.relu().sum(1).mean(),
        (frozen - acts).pow(2).sum(1).mean(),
    )
    (sum(parts) / D_IN).backward()
    for mine, part in zip((losses.reconstruction, losses.sparsity, losses.aux), parts, strict=True):
        torch.testing.assert_close(mine, (part / D_IN).detach())
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, msg=lambda text, n=name: f"{n}: {text}")
    assert torch.equal(losses.fired, (feature_acts > 0).any(0))
    assert losses.l0.item() == pytest.approx((feature_acts > 0).sum(1).double().mean().item())


def test_a_gated_sae_is_a_jumprelu_of_its_magnitudes():
    sae, acts = random_sae(), torch.randn(40, D_IN, dtype=torch.float64)
    pre_acts, floor = sae.pre_acts(acts), sae.activation_floor()
    torch.testing.assert_close(sae.encode(acts), pre_acts.relu() * (pre_acts > floor))


def test_the_l1_norm_of_the_gate_is_warmed_up():
    sae, acts = random_sae(), torch.randn(30, D_IN, dtype=torch.float64)
    sae.cfg = GatedConfig(d_sae=D_SAE, l1_warmup_share=0.2)
    whole = sae.training_loss(acts).sparsity.item()
    assert sae.training_loss(acts, progress=0.0).sparsity.item() == 0.0
    assert sae.training_loss(acts, progress=0.05).sparsity.item() == pytest.approx(whole / 4)
    assert sae.training_loss(acts, progress=0.2).sparsity.item() == pytest.approx(whole)


@pytest.mark.parametrize("shift", [-1e3, 1e3], ids=["all shut", "all open"])
def test_extreme_gates_train(shift):
    sae = random_sae()
    with torch.no_grad():
        sae.b_gate.fill_(shift)
    for acts in (torch.zeros(1, D_IN), torch.randn(5, D_IN)):
        losses = sae.training_loss(acts.double())
        losses.total.backward()
        assert losses.total.isfinite()
        assert losses.l0.item() == (0 if shift < 0 else pytest.approx((sae.encode(acts) > 0).sum(1).double().mean()))
        assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_training_finds_the_toy_dictionary(trained_on_toys):
    result = trained_on_toys(GatedConfig(d_sae=48))
    assert result.explained_variance > 0.93
    assert result.l0 < 12


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d_sae": 0}, "d_sae"),
        ({"l1_coefficient": -1.0}, "l1_coefficient"),
        ({"l1_warmup_share": 2.0}, "l1_warmup_share"),
    ],
)
def test_impossible_settings_of_gated_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        GatedConfig(**{"d_sae": 8, **settings})
