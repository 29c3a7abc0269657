"""Losses without reference, on unpaired answers, of the reward model and of policy optimisation."""

import json
import math
from pathlib import Path

import pytest
import torch

from saelab.align.advantages import gae, group_normalised, kl_estimate, leave_one_out, token_rewards
from saelab.align.losses.pairwise import PairLogps, sigmoid_loss
from saelab.align.losses.policy import grpo_loss, ppo_policy_loss, ppo_value_loss
from saelab.align.losses.reference_free import cpo_loss, log1mexp, orpo_loss, simpo_loss
from saelab.align.losses.reward import bradley_terry_loss
from saelab.align.losses.unpaired import apo_zero_unpaired_loss, kto_baseline, kto_loss
from saelab.align.masked import masked_mean, masked_var, whiten

HERE = Path(__file__).parent
TRL = json.loads((HERE / "trl_1.16.0.json").read_text())
PPO = json.loads((HERE / "trl_ppo_1.12.0.json").read_text())["ppo"]
ARCHS = ["llama", "gpt2"]
DTYPE = torch.float64


def tensor(values) -> torch.Tensor:
    return torch.tensor(values, dtype=DTYPE)


# --- reward model


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("name", "options"),
    [("plain", {}), ("center=0.01", {"centring": 0.01}), ("margin", {"margin": tensor([0.5, 0.0, -0.3, 2.0])})],
)
def test_the_reward_loss_equals_trls(arch, name, options):
    rewards = tensor(TRL[arch]["rm"]["rewards"])
    ours = bradley_terry_loss(rewards[:4], rewards[4:], **options).loss.mean()
    assert ours.item() == pytest.approx(TRL[arch]["rm"][name]["loss"], rel=1e-5)


def test_a_reward_model_that_cannot_tell_has_the_loss_of_a_coin():
    assert bradley_terry_loss(tensor([3.0]), tensor([3.0])).loss.item() == pytest.approx(math.log(2))


# --- KTO


def kto_case(arch: str, *, swapped: bool):
    kto = TRL[arch]["kto"]
    policy, ref = (tensor(kto["logps"][name]) for name in ("policy", "ref"))
    ratios = ref - policy if swapped else policy - ref
    return ratios[0], ratios[1], torch.tensor(kto["batch"]["label"])


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize(
    ("swapped", "weights"),  # what was recorded
    [(False, (1.0, 1.0)), (True, (1.0, 1.0)), (True, (1.33, 0.7))],
)
def test_kto_equals_trls(arch, swapped, weights):
    key = "kto|beta=0.1"
    if weights != (1.0, 1.0):
        key += "|desirable_weight=1.33|undesirable_weight=0.7"
    key += "|policy=ref-weights,ref=policy-weights" if swapped else ""
    expected = TRL[arch]["kto"]["losses"][key]
    ratios, mismatched, label = kto_case(arch, swapped=swapped)
    baseline = kto_baseline(mismatched)
    assert baseline.item() == pytest.approx(expected["kl"], rel=1e-5, abs=1e-9)
    ours = kto_loss(
        ratios, label, baseline, beta=0.1, desirable_weight=weights[0], undesirable_weight=weights[1]
    ).loss.mean()
    assert ours.item() == pytest.approx(expected["loss"], rel=1e-5)


@pytest.mark.parametrize("arch", ARCHS)
def test_unpaired_apo_equals_trls(arch):
    ratios, _, label = kto_case(arch, swapped=False)
    ours = apo_zero_unpaired_loss(ratios, label, beta=0.1).loss.mean()
    assert ours.item() == pytest.approx(TRL[arch]["kto"]["losses"]["apo_zero_unpaired|beta=0.1"]["loss"], rel=1e-5)


def test_ktos_baseline_is_a_constant_and_never_negative():
    ratios = torch.tensor([-3.0, -1.0], requires_grad=True)
    baseline = kto_baseline(ratios)
    assert baseline.item() == 0.0
    assert not baseline.requires_grad
    with pytest.raises(ValueError, match="at least 2"):
        kto_baseline(ratios[:1])


def test_ktos_gradient_vanishes_for_hopeless_labels():
    ratios = torch.tensor([-200.0, 200.0], dtype=DTYPE, requires_grad=True)
    kto_loss(ratios, torch.tensor([True, False]), tensor(0.0), beta=0.1).loss.sum().backward()
    assert ratios.grad.abs().max() < 1e-6


# --- without reference


def test_simpo_shifts_by_gamma_and_does_not_see_the_length():
    chosen, rejected, n = tensor([-6.0]), tensor([-9.0]), torch.tensor([3])
    base = simpo_loss(chosen, rejected, n, n, beta=2.0, gamma=1.0)
    assert base.loss.item() == pytest.approx(math.log1p(math.exp(-(2 * (-2.0 + 3.0) - 1))))
    longer = simpo_loss(2 * chosen, 2 * rejected, 2 * n, 2 * n, beta=2.0, gamma=1.0)
    assert longer.loss.item() == base.loss.item()


def test_cpo_is_dpo_under_a_uniform_reference_plus_nll():
    chosen, rejected, n = tensor([-6.0, -2.0]), tensor([-9.0, -1.0]), torch.tensor([3, 1])
    zero = torch.zeros(2, dtype=DTYPE)
    dpo = sigmoid_loss(PairLogps(chosen, rejected, zero, zero, n, n), beta=0.2).loss.mean()
    both = cpo_loss(chosen, rejected, n, beta=0.2, alpha=0.5).loss.mean()
    assert both.item() == pytest.approx(dpo.item() + 0.5 * 8 / 4)


@pytest.mark.parametrize("arch", ARCHS)
def test_orpo_adds_up_as_trls(arch):
    metrics = TRL[arch]["orpo_cpo_simpo"]["orpo|beta=0.1"]
    nll, ratio = metrics["metrics"]["eval_nll_loss"], metrics["metrics"]["eval_log_odds_ratio"]
    assert nll - 0.1 * ratio == pytest.approx(metrics["loss"], rel=1e-6)


def test_orpo_without_its_odds_is_the_likelihood_and_equal_answers_cost_ln_2():
    chosen, n, nll = tensor([-6.0]), torch.tensor([3]), tensor([1.5])
    assert orpo_loss(nll, chosen, tensor([-9.0]), n, n, beta=0.0).loss.item() == 1.5
    assert orpo_loss(nll, chosen, chosen, n, n, beta=0.3).loss.item() == pytest.approx(1.5 + 0.3 * math.log(2))


def test_log1mexp_is_exact_at_both_ends_and_its_gradient_finite():
    for logp in (-1e-12, -1e-3, -0.5, -5.0, -80.0):
        exact = math.log(-math.expm1(logp)) if logp > -0.7 else math.log1p(-math.exp(logp))
        assert log1mexp(tensor(logp)).item() == pytest.approx(exact, rel=1e-12)
    at_zero = torch.zeros(1, requires_grad=True)
    value = log1mexp(at_zero)
    value.sum().backward()
    assert torch.isfinite(value).all()
    assert torch.isfinite(at_zero.grad).all()


# --- PPO


def ppo_inputs():
    inputs = PPO["inputs"]
    responses = torch.tensor(inputs["responses"])
    last = torch.tensor(PPO["sequence_lengths"])
    places = torch.arange(responses.shape[1])
    mask = places <= last[:, None]
    # TRL gives short rows one more place, behind EOS, for the score and a value
    places_p1 = places <= (last + 1)[:, None]
    score_at = torch.where(last + 1 < responses.shape[1], last + 1, last)
    logps, ref_logps, values, scores = (
        tensor(inputs[name]) for name in ("logprobs", "ref_logprobs", "values", "scores")
    )
    return logps, ref_logps, values, scores, mask, places_p1, score_at


def test_masked_statistics_equal_trls():
    _, _, values, *_ = ppo_inputs()
    mask = torch.tensor(PPO["inputs"]["responses"]) != 0
    assert masked_var(values, mask).item() == pytest.approx(PPO["masked_var(values)"], rel=1e-5)
    for key, shift in (("masked_whiten(values)", True), ("masked_whiten(values,shift_mean=False)", False)):
        ours = whiten(values, mask, shift_mean=shift)
        torch.testing.assert_close(ours[mask], tensor(PPO[key])[mask], rtol=1e-5, atol=1e-6)
        assert (ours[~mask] == 0).all()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
@pytest.mark.parametrize("whiten_rewards", [False, True])
def test_rewards_advantages_and_losses_equal_trls(estimator, whiten_rewards):
    expected = PPO[f"{estimator}|whiten_rewards={whiten_rewards}"]
    logps, ref, values, scores, mask, mask_p1, score_at = ppo_inputs()
    kl = kl_estimate(logps, ref, estimator=estimator).where(mask, 0.0)
    torch.testing.assert_close(kl, tensor(expected["kl"]), rtol=1e-5, atol=1e-6)
    rewards = token_rewards(kl, scores, score_at, mask, beta=0.05)
    if whiten_rewards:
        rewards = whiten(rewards, mask_p1, shift_mean=False)
    torch.testing.assert_close(rewards, tensor(expected["rewards"]), rtol=1e-5, atol=1e-6)
    advantages, returns = gae(rewards, values, mask_p1, gamma=1.0, lam=0.95)
    torch.testing.assert_close(returns, tensor(expected["returns"]), rtol=1e-5, atol=1e-6)
    advantages = whiten(advantages, mask)
    torch.testing.assert_close(advantages, tensor(expected["advantages"]), rtol=1e-5, atol=1e-6)

    new, predicted = tensor(expected["new_logprobs"]), tensor(expected["vpred"])
    policy = ppo_policy_loss(new, logps, advantages, mask, clip=0.2)
    old_values = values.where(mask_p1, 0.0)
    value = ppo_value_loss(predicted, old_values, returns, mask_p1, clip=0.2)
    assert policy.loss.item() == pytest.approx(expected["pg_loss"], rel=1e-5)
    assert value.loss.item() == pytest.approx(expected["vf_loss"], rel=1e-5)
    assert value.clip_fraction.item() == pytest.approx(expected["vf_clipfrac"], rel=1e-5)
    assert (policy.loss + 0.1 * value.loss).item() == pytest.approx(expected["loss"], rel=1e-5)


def test_gae_by_hand():
    rewards, values = tensor([[1.0, 0.0, 2.0, 9.0]]), tensor([[0.5, 1.0, -1.0, 7.0]])
    mask = torch.tensor([[True, True, True, False]])
    advantages, returns = gae(rewards, values, mask, gamma=0.9, lam=0.5)
    third = 2.0 + 1.0
    second = (0.0 + 0.9 * -1.0 - 1.0) + 0.45 * third
    first = (1.0 + 0.9 * 1.0 - 0.5) + 0.45 * second
    torch.testing.assert_close(advantages, tensor([[first, second, third, 0.0]]))
    torch.testing.assert_close(returns, tensor([[first + 0.5, second + 1.0, third - 1.0, 0.0]]))


def test_padding_changes_no_advantage():
    torch.manual_seed(0)
    rewards, values = torch.randn(2, 3, 5, dtype=DTYPE)
    mask = torch.arange(5) < torch.tensor([5, 2, 3])[:, None]
    short = whiten(gae(rewards, values, mask).advantages, mask)
    padded = [torch.cat([x, torch.full((3, 4), 1e6, dtype=DTYPE)], 1) for x in (rewards, values)]
    wide = torch.cat([mask, torch.zeros(3, 4, dtype=torch.bool)], 1)
    torch.testing.assert_close(whiten(gae(*padded, wide).advantages, wide)[:, :5], short)


def test_a_row_without_tokens_gives_no_nan():
    values, none = torch.randn(2, 4), torch.zeros(2, 4, dtype=torch.bool)
    assert torch.isfinite(whiten(values, none)).all()
    assert masked_mean(values, none).item() == 0.0


def test_the_score_is_added_at_the_last_token():
    mask = torch.tensor([[True, True, False], [True, True, True]])
    rewards = token_rewards(torch.ones(2, 3), torch.tensor([5.0, 7.0]), torch.tensor([1, 2]), mask, beta=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, 4.9, 0.0], [-0.1, -0.1, 6.9]]))


def test_the_first_step_of_ppo_is_the_policy_gradient():
    torch.manual_seed(0)
    logps = torch.randn(2, 3, dtype=DTYPE, requires_grad=True)
    advantages, mask = torch.randn(2, 3, dtype=DTYPE), torch.tensor([[True, True, False], [True, True, True]])
    result = ppo_policy_loss(logps, logps.detach(), advantages, mask)
    result.loss.backward()
    torch.testing.assert_close(logps.grad, -(advantages / 5).where(mask, 0.0))
    assert result.clip_fraction.item() == result.approx_kl.item() == 0.0


def test_ratios_of_absurd_size_stay_finite():
    mask = torch.ones(1, 2, dtype=torch.bool)
    loss = ppo_policy_loss(torch.tensor([[200.0, -200.0]]), torch.zeros(1, 2), torch.ones(1, 2), mask).loss
    assert torch.isfinite(loss)


# --- groups


def test_leave_one_out_by_hand_and_its_bias():
    scores = tensor([[1.0, 2.0, 6.0]])
    torch.testing.assert_close(leave_one_out(scores), tensor([[1 - 4.0, 2 - 3.5, 6 - 1.5]]))
    with pytest.raises(ValueError, match="at least 2"):
        leave_one_out(scores[:, :1])


def test_group_advantages_have_no_mean_and_equal_scores_none_at_all():
    scores = tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]])
    advantages = group_normalised(scores)
    assert advantages.mean(1).abs().max() < 1e-12
    assert advantages[0].std().item() == pytest.approx(1.0, rel=1e-3)
    assert (advantages[1] == 0).all()
    torch.testing.assert_close(group_normalised(scores, divide_by_std=False)[0], scores[0] - 3)


@pytest.mark.parametrize(
    ("aggregation", "expected"), [("sequences", (2.0 + 1.0) / 2), ("tokens", 8.0 / 5), ("constant", 8.0 / 8)]
)
def test_tokens_are_aggregated_as_named(aggregation, expected):
    mask = torch.tensor([[True, True, True, False], [True, True, False, False]])
    zeros = torch.zeros(2, 4, dtype=DTYPE)
    loss = grpo_loss(zeros, zeros, tensor([-2.0, -1.0]), mask, aggregation=aggregation).loss
    assert loss.item() == pytest.approx(expected)


def test_cispo_keeps_the_gradient_of_a_token_that_clipping_would_silence():
    logps = tensor([[0.0, -1.0]]).requires_grad_()
    old, mask = tensor([[-3.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)  # ratios e^3 and 1
    gradients = {}
    for surrogate in ("clipped", "cispo"):
        result = grpo_loss(logps, old, tensor([2.0]), mask, aggregation="tokens", surrogate=surrogate, ratio_cap=4.0)
        (gradients[surrogate],) = torch.autograd.grad(result.loss, logps)
        assert result.clip_fraction.item() == 0.5
    assert gradients["clipped"].tolist() == [[0.0, -1.0]]
    # -min(ratio, cap) A / 2 tokens
    torch.testing.assert_close(gradients["cispo"], tensor([[-4.0, -1.0]]))


# --- KL estimators


def test_two_estimators_are_unbiased_and_one_is_not():
    torch.manual_seed(0)
    policy, ref = torch.randn(2, 5, dtype=DTYPE).log_softmax(1)
    exact = (policy.exp() * (policy - ref)).sum()
    means = {name: (policy.exp() * kl_estimate(policy[None], ref[None], estimator=name)[0]).sum() for name in KINDS}
    assert means["k1"].item() == pytest.approx(exact.item())
    assert means["k3"].item() == pytest.approx(exact.item())
    assert abs(means["k2"] - exact) > 0.01


def test_as_a_loss_only_k2_has_the_gradient_of_the_kl():
    """Expectation over the sampling distribution of the gradient of each estimator, by enumeration."""
    torch.manual_seed(1)
    logits, ref = torch.randn(5, dtype=DTYPE, requires_grad=True), torch.randn(5, dtype=DTYPE).log_softmax(0)
    policy = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((policy.exp() * (policy - ref)).sum(), logits)
    (forward,) = torch.autograd.grad((ref.exp() * (ref - logits.log_softmax(0))).sum(), logits)
    gradients = {}
    for name in KINDS:
        policy = logits.log_softmax(0)
        loss = (policy.detach().exp() * kl_estimate(policy[None], ref[None], estimator=name)[0]).sum()
        (gradients[name],) = torch.autograd.grad(loss, logits)
    torch.testing.assert_close(gradients["k2"], exact)
    assert gradients["k1"].abs().max() < 1e-12
    torch.testing.assert_close(gradients["k3"], forward)


KINDS = ("k1", "k2", "k3")
