"""The p-annealed SAE: the penalty by hand, its exponent over the training, the coefficient that follows it."""

from __future__ import annotations

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae import affine
from saelab.sae.architectures import new_sae
from saelab.sae.panneal import SMALL, PAnneal, PAnnealConfig, lp_penalty
from saelab.sae.relu import ReLU, ReLUConfig

D_IN, D_SAE = 12, 200


def small(config: PAnnealConfig) -> PAnneal:
    """Two inputs, two features: feature 0 reads the first input, feature 1 the second and writes it doubled."""
    sae = new_sae(config, d_in=2).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    return sae


def test_the_penalty_and_its_gradient_by_hand():
    sae = small(PAnnealConfig(d_sae=2, l1_coefficient=0.5, p_end=0.5))
    sae.p.fill_(0.5)  # as training would have left it, with a coefficient of 3 times the first
    sae.coefficient_ratio.fill_(3.0)
    losses = sae.training_loss(torch.tensor([[4.0, -1.0], [0.0, 9.0]]))
    losses.total.backward()
    # feature_acts (4, 0) and (0, 9): roots 2 and 3; recon (4, 0) and (0, 18); squared errors 1 and 81
    assert losses.reconstruction.item() == pytest.approx((1 + 81) / 4)
    assert losses.sparsity.item() == pytest.approx(1.5 * (2 + 3) / 4)
    assert losses.total.item() == pytest.approx((82 + 7.5) / 4)
    # d sqrt(f) = 1 / (2 sqrt(f)): 1/4 and 1/6; errors (0, 1) and (0, 9) reach f by W_dec: 0 and 18; times 2/4
    assert sae.b_enc.grad.tolist() == pytest.approx([1.5 / 4 / 4, 1.5 / 6 / 4 + 18 * 2 / 4])
    assert sae.W_dec.grad.tolist() == [pytest.approx([0.0, 4 * 1 * 2 / 4]), pytest.approx([0.0, 9 * 9 * 2 / 4])]


def test_p_runs_from_1_to_its_end():
    config = PAnnealConfig(d_sae=8, p_end=0.2, anneal_start=0.25)
    assert [config.p_at(progress) for progress in (0.0, 0.1, 0.25)] == [1.0, 1.0, 1.0]
    assert config.p_at(0.625) == pytest.approx(0.6)
    assert config.p_at(1.0) == 0.2
    assert PAnnealConfig(d_sae=8, anneal_start=0.0).p_at(0.5) == pytest.approx(0.6)


def test_at_p_1_it_is_the_relu_autoencoder():
    acts = torch.randn(30, D_IN)
    seeds = [torch.Generator().manual_seed(3) for _ in range(2)]
    annealed = new_sae(PAnnealConfig(d_sae=D_SAE, anneal_start=0.5), d_in=D_IN, generator=seeds[0])
    relu = new_sae(ReLUConfig(d_sae=D_SAE), d_in=D_IN, generator=seeds[1])
    assert isinstance(relu, ReLU)
    for progress in (0.0, 0.03, 0.4):
        mine, theirs = (sae.training_loss(acts, progress=progress) for sae in (annealed, relu))
        assert mine.total.item() == theirs.total.item()


def test_the_coefficient_keeps_the_penalty_as_large_as_it_was_when_p_moves():
    sae = small(PAnnealConfig(d_sae=2, l1_coefficient=0.5, anneal_start=0.0, l1_warmup_share=0.0, p_end=0.2))
    acts = torch.tensor([[4.0, 1.0], [0.25, 9.0]])
    first = sae.training_loss(acts, progress=0.0).sparsity.item()
    for progress in (0.25, 0.5, 1.0):
        assert sae.training_loss(acts, progress=progress).sparsity.item() == pytest.approx(first)
    # with batches that stay the same the ratios multiply to that of the ends
    ratio = (4 + 1 + 0.25 + 9) / sum(f**0.2 for f in (4, 1, 0.25, 9))
    assert sae.coefficient_ratio.item() == pytest.approx(ratio)
    assert sae.p.item() == pytest.approx(0.2)


def test_a_step_that_does_not_move_p_leaves_the_coefficient():
    sae = small(PAnnealConfig(d_sae=2, anneal_start=0.0))
    sae.training_loss(torch.tensor([[4.0, 1.0]]), progress=0.5)
    ratio = sae.coefficient_ratio.item()
    assert ratio != 1.0
    sae.training_loss(torch.tensor([[2.0, 7.0]]), progress=0.5)
    assert sae.coefficient_ratio.item() == ratio


@pytest.mark.parametrize("acts", [torch.full((3, 2), -1.0), torch.tensor([[1.0, float("nan")]]), torch.zeros(1, 2)])
def test_a_batch_that_gives_no_ratio_leaves_p_and_coefficient(acts):
    sae = small(PAnnealConfig(d_sae=2, anneal_start=0.0))
    sae.training_loss(acts, progress=0.5)
    assert (sae.p.item(), sae.coefficient_ratio.item()) == (1.0, 1.0)
    sae.training_loss(torch.tensor([[4.0, 1.0]]), progress=0.6)
    assert sae.p.item() == pytest.approx(1 - 0.8 * 0.6)


def test_the_state_of_the_annealing_is_in_the_state_dict():
    config = PAnnealConfig(d_sae=D_SAE, anneal_start=0.0)
    batches = torch.randn(6, 30, D_IN)
    one, two = (new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    for step in range(3):
        one.training_loss(batches[step], progress=step / 5)
    two.load_state_dict(one.state_dict())
    for step in range(3, 6):
        losses = [sae.training_loss(batches[step], progress=step / 5) for sae in (one, two)]
        assert torch.equal(losses[0].total, losses[1].total)


def test_the_penalty_continues_as_a_line_to_zero():
    for p in (0.2, 0.7, 1.0):
        acts = torch.tensor([0.0, SMALL / 2, SMALL, 2 * SMALL, 1.0], dtype=torch.float64, requires_grad=True)
        (slopes,) = torch.autograd.grad(lp_penalty(acts, p), acts)
        values = [lp_penalty(value, p).item() for value in acts.detach()]
        assert values[0] == 0.0
        assert values[1] == pytest.approx(SMALL**p / 2)
        assert values[2:] == pytest.approx([SMALL**p, (2 * SMALL) ** p, 1.0])
        assert slopes[:2].tolist() == pytest.approx([SMALL ** (p - 1)] * 2)
        assert slopes[3:].tolist() == pytest.approx([p * (2 * SMALL) ** (p - 1), p])


@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
def test_both_ways_give_the_same_loss_and_gradient_in_float64(few, monkeypatch):
    sae = new_sae(PAnnealConfig(d_sae=D_SAE), d_in=D_IN, generator=torch.Generator().manual_seed(3)).double()
    acts = torch.randn(30, D_IN, dtype=torch.float64)
    with torch.no_grad():
        sae.b_dec += 1
        sae.b_enc -= 1
        sae.p.fill_(0.3)
    sae.cfg = PAnnealConfig(d_sae=D_SAE, p_end=0.3)
    monkeypatch.setattr(affine, "FEW", few + 1e-9)
    losses = sae.training_loss(acts)
    losses.total.backward()
    grads = {name: parameter.grad for name, parameter in sae.named_parameters()}
    sae.zero_grad()
    feature_acts = sae.encode(acts)
    expected = (sae.decode(feature_acts) - acts).pow(2).sum(1).mean() / D_IN + lp_penalty(
        feature_acts, 0.3
    ) / acts.numel()
    expected.backward()
    torch.testing.assert_close(losses.total, expected, rtol=1e-6, atol=0)  # p itself is a float32 number
    for name, parameter in sae.named_parameters():
        torch.testing.assert_close(grads[name], parameter.grad, rtol=1e-6, atol=1e-9)
    assert losses.l0.item() == pytest.approx((feature_acts > 0).sum(1).double().mean().item())


def test_annealing_ends_sparser_than_l1_at_the_same_error(trained_on_toys):
    annealed = trained_on_toys(PAnnealConfig(d_sae=48))
    plain = trained_on_toys(ReLUConfig(d_sae=48))
    assert annealed.explained_variance > 0.85
    assert annealed.explained_variance > plain.explained_variance - 0.01
    assert annealed.l0 < 0.8 * plain.l0
    assert annealed.sae.p.item() == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d_sae": 0}, "d_sae"),
        ({"l1_coefficient": -1.0}, "l1_coefficient"),
        ({"p_end": 0.0}, "p_end"),
        ({"p_end": 1.1}, "p_end"),
        ({"anneal_start": 1.0}, "anneal_start"),
        ({"l1_warmup_share": -0.1}, "l1_warmup_share"),
    ],
)
def test_impossible_settings_of_panneal_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        PAnnealConfig(**{"d_sae": 8, **settings})
