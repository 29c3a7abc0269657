"""The JumpReLU SAE: each penalty by hand, the straight-through gradient against formula, kernel and expectation."""

from __future__ import annotations

import math
from statistics import NormalDist

import pytest
import torch

from saelab.errors import ConfigError
from saelab.sae import affine
from saelab.sae.architectures import new_sae
from saelab.sae.jumprelu import JumpReLU, JumpReLUConfig, StraightThrough
from saelab_kernels.jumprelu.reference import threshold_grad

D_IN, D_SAE = 12, 200
PENALTIES = [
    JumpReLUConfig(d_sae=D_SAE, penalty="step", bandwidth=0.5),
    JumpReLUConfig(d_sae=D_SAE, penalty="quadratic", target_l0=5.0, bandwidth=0.5),
    JumpReLUConfig(d_sae=D_SAE, penalty="tanh", bandwidth=0.5),
]
every_penalty = pytest.mark.parametrize("config", PENALTIES, ids=lambda config: config.penalty)


def small(**settings) -> JumpReLU:
    """Two inputs, two features that read one each; thresholds 1 and 2, a window from half below to half above."""
    sae = new_sae(JumpReLUConfig(d_sae=2, bandwidth=1.0, **settings), d_in=2).double()
    with torch.no_grad():
        sae.encoder.copy_(torch.eye(2))
        sae.W_dec.copy_(torch.tensor([[0.6, 0.8], [0.0, 1.0]], dtype=torch.float64))
        sae.threshold.copy_(torch.tensor([1.0, 2.0]))
    return sae


#: Pre-activations: on and near, off and near; on and far, off and far; equal to the threshold, which is off, and near.
ACTS = torch.tensor([[1.25, 1.75], [3.0, 0.5], [1.0, 2.0]], dtype=torch.float64)


def make(config: JumpReLUConfig, *, threshold: float = 0.5) -> JumpReLU:
    sae = new_sae(config, d_in=D_IN, generator=torch.Generator().manual_seed(3)).double()
    assert isinstance(sae, JumpReLU)
    with torch.no_grad():
        sae.threshold.copy_(threshold + 0.2 * torch.rand(D_SAE))
        sae.b_enc.copy_(0.1 * torch.randn(D_SAE))
        sae.b_dec.copy_(torch.randn(D_IN))
    return sae


def test_the_three_penalties_by_hand():
    # feature_acts (1.25, 0), (3, 0), (0, 0): L0 is 1, 1, 0
    # recon (.75, 1), (1.8, 2.4), (0, 0); errors (-.5, -.75), (-1.2, 1.9), (-1, -2): squares .8125, 5.05, 5
    error = (0.8125 + 5.05 + 5) / 6
    step = small(penalty="step", l0_coefficient=0.3).training_loss(ACTS)
    assert step.reconstruction.item() == pytest.approx(error)
    assert step.sparsity.item() == pytest.approx(0.3 * (2 / 3) / 2)
    quadratic = small(penalty="quadratic", target_l0=0.5, l0_coefficient=0.3).training_loss(ACTS)
    assert quadratic.sparsity.item() == pytest.approx(0.3 * ((2 / 3) / 0.5 - 1) ** 2)
    tanh = small(penalty="tanh", tanh_scale=0.2, l0_coefficient=0.3).training_loss(ACTS)
    assert tanh.sparsity.item() == pytest.approx(0.3 * (math.tanh(0.25) + math.tanh(0.6)) / 3 / 2)
    for losses in (step, quadratic, tanh):
        assert losses.total.item() == pytest.approx(error + losses.sparsity.item())
        assert losses.l0.item() == pytest.approx(2 / 3)
        assert losses.fired.tolist() == [True, False]


def test_the_gradients_of_the_step_penalty_by_hand():
    sae = small(penalty="step", l0_coefficient=0.3)
    sae.training_loss(ACTS).total.backward()
    # dL/df = W_dec e / 3 (mean over 6 numbers, times 2). Near are: both of row 0, both of row 2
    row0 = (0.6 * -0.5 + 0.8 * -0.75) / 3, -0.75 / 3
    row2 = (0.6 * -1 + 0.8 * -2) / 3, -2 / 3
    dense = 0.3 / 3 / 2  # dL/dH of each
    expected = [-(1 * row0[0] + dense) - (1 * row2[0] + dense), -(2 * row0[1] + dense) - (2 * row2[1] + dense)]
    assert sae.threshold.grad.tolist() == pytest.approx(expected)
    # only what is on passes a gradient to z: feature 0 in rows 0 and 1
    row1 = (0.6 * -1.2 + 0.8 * 1.9) / 3
    assert sae.b_enc.grad.tolist() == pytest.approx([row0[0] + row1, 0.0])
    assert sae.encoder.grad.tolist() == [
        pytest.approx([1.25 * row0[0] + 3 * row1, 1.75 * row0[0] + 0.5 * row1]),
        [0, 0],
    ]


def test_the_gradients_of_the_quadratic_penalty_by_hand():
    sae = small(penalty="quadratic", target_l0=0.5, l0_coefficient=0.3)
    with torch.no_grad():
        sae.W_dec.zero_()  # the penalty alone
    sae.training_loss(ACTS).total.backward()
    # d/dL0 = 2 (L0 / target - 1) / target; each of the two near pairs of a feature counts a third of -1 / eps
    slope = 0.3 * 2 * (1 / 3) / 0.5
    assert sae.threshold.grad.tolist() == pytest.approx([-slope * 2 / 3] * 2)
    assert not sae.b_enc.grad.any()


def test_the_gradients_of_the_tanh_penalty_by_hand():
    sae = small(penalty="tanh", tanh_scale=0.2, l0_coefficient=0.3)
    with torch.no_grad():
        sae.W_dec.zero_()
    sae.training_loss(ACTS).total.backward()

    def slope(act: float) -> float:
        return 0.3 * 0.2 * (1 - math.tanh(0.2 * act) ** 2) / 3 / 2

    # to thresholds -theta / eps of near pairs; to z the same with the other sign, and what is on besides
    through = [slope(1.25) + slope(0.0), 2 * 2 * slope(0.0)]
    assert sae.threshold.grad.tolist() == pytest.approx([-part for part in through])
    assert sae.b_enc.grad.tolist() == pytest.approx([through[0] + slope(1.25) + slope(3.0), through[1]])


@every_penalty
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
def test_the_threshold_gradient_is_the_definitions(config, few, monkeypatch):
    monkeypatch.setattr(affine, "FEW", few + 1e-9)
    sae, acts = make(config), torch.randn(40, D_IN, dtype=torch.float64)
    losses = sae.training_loss(acts)
    losses.total.backward()
    pre_acts = sae.pre_acts(acts).detach()
    feature_acts = (pre_acts * (pre_acts > sae.threshold)).detach().requires_grad_()
    error = (feature_acts @ sae.W_dec + sae.b_dec - acts).detach()
    acts_grad, step_grad = 2 * error @ sae.W_dec.detach().T / acts.numel(), torch.zeros_like(pre_acts)
    l0 = (feature_acts > 0).sum(1).double().mean()
    if config.penalty == "step":
        step_grad += 1 / len(acts) / D_IN
    elif config.penalty == "quadratic":
        step_grad += 2 * (l0 / 5 - 1) / 5 / len(acts)
    else:
        (by_tanh,) = torch.autograd.grad(torch.tanh(4 * feature_acts).sum() / acts.numel(), feature_acts)
        acts_grad += by_tanh
    expected = threshold_grad(
        acts - sae.b_dec, sae.encoder, sae.b_enc, sae.threshold, acts_grad, step_grad, bandwidth=0.5
    )
    torch.testing.assert_close(sae.threshold.grad, expected.detach())
    torch.testing.assert_close(losses.l0, l0)
    assert torch.equal(losses.fired, (feature_acts > 0).any(0))


@pytest.mark.parametrize("config", PENALTIES[:2], ids=lambda config: config.penalty)
def test_both_ways_give_the_same_loss_and_gradients(config, monkeypatch):
    acts, results = torch.randn(40, D_IN, dtype=torch.float64), []
    for few in (0.0, 1.0):
        monkeypatch.setattr(affine, "FEW", few + 1e-9)
        torch.manual_seed(5)
        sae = make(config)
        losses = sae.training_loss(acts)
        losses.total.backward()
        results.append([losses.total, losses.sparsity, *(parameter.grad for parameter in sae.parameters())])
    for dense, pairs in zip(*results, strict=True):
        torch.testing.assert_close(dense, pairs)


def test_the_straight_through_gradient_is_that_of_the_expectation():
    """For z with a density p, d E[step] / d theta = -p(theta) and d E[z step] / d theta = -theta p(theta)."""
    n, theta, eps = 400_000, 0.7, 0.2
    z = torch.tensor([NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)], dtype=torch.float64)[:, None]
    threshold = torch.tensor([theta], dtype=torch.float64, requires_grad=True)
    acts, l0 = StraightThrough.apply(z, threshold, eps, False)
    (by_step,) = torch.autograd.grad(l0, threshold, retain_graph=True)
    (by_acts,) = torch.autograd.grad(acts.mean(), threshold)
    density = NormalDist().pdf(theta)
    assert by_step.item() == pytest.approx(-density, rel=0.005)
    assert by_acts.item() == pytest.approx(-theta * density, rel=0.005)
    # and of the finite difference of what is estimated, with the window as its step
    low, high = (StraightThrough.apply(z, torch.tensor([theta + s * eps / 2]).double(), eps, False)[1] for s in (-1, 1))
    assert by_step.item() == pytest.approx(((high - low) / eps).item(), rel=1e-3)


def test_the_quadratic_penalty_of_several_processes_is_that_of_the_whole_batch():
    class Two:
        """Another process whose L0 is 9."""

        size = 2

        def mean(self, tensor):
            return (tensor + 9) / 2

    sae, acts = make(PENALTIES[1]), torch.randn(40, D_IN, dtype=torch.float64)
    alone = sae.training_loss(acts)
    sae.tokens = Two()
    together = sae.training_loss(acts)
    assert together.sparsity.item() == pytest.approx(((alone.l0.item() + 9) / 2 / 5 - 1) ** 2)


def test_the_coefficient_is_warmed_up():
    config = JumpReLUConfig(d_sae=D_SAE, l0_coefficient=3.0, l0_warmup_share=0.2)
    assert [config.coefficient_at(progress) for progress in (0.0, 0.1, 0.2, 1.0)] == [0.0, 1.5, 3.0, 3.0]
    sae, acts = make(config), torch.randn(40, D_IN, dtype=torch.float64)
    whole = sae.training_loss(acts).sparsity.item()
    assert sae.training_loss(acts, progress=0.1).sparsity.item() == pytest.approx(whole / 2)


def test_the_pre_activation_loss_by_hand_is_of_dead_features_alone():
    dead = torch.tensor([False, True])
    sae = small(penalty="step", l0_coefficient=0.0, pre_act_coefficient=0.1)
    losses = sae.training_loss(ACTS, dead=dead)
    # thresholds less pre-activations of feature 1: 0.25, 1.5, 0
    assert losses.aux.item() == pytest.approx(0.1 * 1.75 / 3 / 2)
    assert losses.total.item() == pytest.approx(losses.reconstruction.item() + losses.aux.item())
    sae.W_dec.requires_grad_(False).zero_()
    sae.training_loss(ACTS, dead=dead).total.backward()
    assert sae.threshold.grad[1].item() == pytest.approx(0.1 * 2 / 6)  # two rows are below it
    assert sae.b_enc.grad.tolist() == pytest.approx([0.0, -0.1 * 2 / 6])
    for off in (None, torch.zeros(2, dtype=torch.bool)):
        assert small(penalty="step", pre_act_coefficient=0.1).training_loss(ACTS, dead=off).aux.item() == 0.0
    assert small(penalty="step").training_loss(ACTS, dead=dead).aux.item() == 0.0


def test_thresholds_stay_at_0_or_above_and_leave_it_again():
    sae = small(penalty="step")
    with torch.no_grad():
        sae.threshold.copy_(torch.tensor([-0.3, 2.0]))
    sae.normalise_decoder_()
    assert sae.threshold.tolist() == [0.0, 2.0]
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(2).double())
    sae.training_loss(torch.tensor([[0.1, 0.0]], dtype=torch.float64)).total.backward()
    assert sae.threshold.grad[0].item() != 0  # a gradient at 0, so no feature is pinned there


def test_the_first_threshold_lets_the_target_pass():
    config = JumpReLUConfig(d_sae=2000, penalty="quadratic", target_l0=20.0)
    sae = new_sae(config, d_in=64, generator=torch.Generator().manual_seed(3))
    assert sae.training_loss(torch.randn(500, 64)).l0.item() == pytest.approx(20, rel=0.15)
    assert JumpReLUConfig(d_sae=8).first_threshold == 0.1
    assert JumpReLUConfig(d_sae=8, penalty="step").first_threshold == 0.0
    assert JumpReLUConfig(d_sae=8, penalty="step", initial_threshold=0.7).first_threshold == 0.7


def test_thresholds_are_float32_parameters_of_their_own_value():
    sae = new_sae(JumpReLUConfig(d_sae=8, initial_threshold=0.25), d_in=4)
    assert dict(sae.named_parameters())["threshold"].dtype == torch.float32
    assert sae.threshold.tolist() == [0.25] * 8


@every_penalty
@pytest.mark.parametrize("few", [0.0, 1.0], ids=["dense", "pairs"])
@pytest.mark.parametrize("batch", [1, 5])
def test_zero_rows_silent_features_and_one_token_train(config, few, batch, monkeypatch):
    monkeypatch.setattr(affine, "FEW", few + 1e-9)
    for threshold in (0.0, 1e3):
        sae = make(config, threshold=threshold)
        losses = sae.training_loss(torch.zeros(batch, D_IN, dtype=torch.float64))
        losses.total.backward()
        assert losses.total.isfinite()
        assert all(parameter.grad.isfinite().all() for parameter in sae.parameters())


def test_each_penalty_trains_the_toy_dictionary(trained_on_toys):
    quadratic = trained_on_toys(JumpReLUConfig(d_sae=48, penalty="quadratic", target_l0=3.0))
    assert quadratic.explained_variance > 0.85
    assert quadratic.l0 == pytest.approx(3.0, abs=0.5)
    for config in (JumpReLUConfig(d_sae=48, l0_coefficient=0.3), JumpReLUConfig(d_sae=48, penalty="step")):
        assert trained_on_toys(config).explained_variance > 0.8


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"d_sae": 0}, "d_sae"),
        ({"l0_coefficient": -1.0}, "l0_coefficient"),
        ({"penalty": "quadratic"}, 'target_l0 belongs to penalty = "quadratic", got None'),
        ({"target_l0": 4.0}, 'target_l0 belongs to penalty = "quadratic", got 4.0 with "tanh"'),
        ({"penalty": "quadratic", "target_l0": 9.0}, "at most d_sae=8, got 9.0"),
        ({"penalty": "quadratic", "target_l0": 0.0}, "above 0"),
        ({"bandwidth": 0.0}, "bandwidth"),
        ({"tanh_scale": -1.0}, "tanh_scale"),
        ({"initial_threshold": -0.1}, "initial_threshold"),
        ({"pre_act_coefficient": -1e-6}, "pre_act_coefficient"),
        ({"l0_warmup_share": 1.01}, "l0_warmup_share"),
    ],
)
def test_impossible_settings_of_jumprelu_are_refused(settings, sentence):
    with pytest.raises(ConfigError, match=sentence):
        JumpReLUConfig(**{"d_sae": 8, **settings})
