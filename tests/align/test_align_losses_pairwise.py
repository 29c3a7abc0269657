"""The pairwise losses: against TRL's own numbers, against closed forms, and against each other."""

import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from saelab.align.losses import pairwise
from saelab.align.losses.pairwise import PairLogps

TRL = json.loads((Path(__file__).parent / "trl_1.16.0.json").read_text())

SMOOTHED = {"label_smoothing": 0.1}
#: The name of the loss in the oracle (up to beta), ours, and its settings.
CASES = [
    ("sigmoid", pairwise.sigmoid_loss, {}),
    ("hinge", pairwise.hinge_loss, {}),
    ("ipo", pairwise.ipo_loss, {}),
    ("robust", pairwise.robust_loss, SMOOTHED),
    ("exo_pair", pairwise.exo_loss, {"label_smoothing": 1e-3}),
    ("nca_pair", pairwise.nca_loss, {}),
    ("bco_pair", pairwise.bco_loss, {}),
    ("sppo_hard", pairwise.sppo_loss, {}),
    ("aot", pairwise.aot_loss, {}),
    ("aot_unpaired", pairwise.aot_unpaired_loss, {}),
    ("apo_zero", pairwise.apo_zero_loss, {}),
    ("apo_down", pairwise.apo_down_loss, {}),
    ("discopop", pairwise.discovered_loss, {}),
    ("sft", pairwise.nll_loss, {}),
    ("sigmoid_norm", pairwise.normalised_sigmoid_loss, {}),
    ("sigmoid|f_divergence_type=forward_kl", pairwise.sigmoid_loss, {"divergence": pairwise.forward_kl}),
    ("sigmoid|f_divergence_type=js_divergence", pairwise.sigmoid_loss, {"divergence": pairwise.jensen_shannon}),
    (
        "sigmoid|f_divergence_type=alpha_divergence|f_alpha_divergence_coef=0.5",
        pairwise.sigmoid_loss,
        {"divergence": pairwise.alpha_divergence(0.5)},
    ),
]

ALL = [*CASES, ("cdpo", pairwise.conservative_loss, SMOOTHED), ("dpop", pairwise.dpop_loss, {})]
ALL.append(("ipo_sum", pairwise.ipo_sum_loss, {}))

numbers = st.floats(-30, 30, allow_nan=False)


def recorded(arch: str, dtype: torch.dtype = torch.float64) -> PairLogps:
    dpo = TRL[arch]["dpo"]
    logps = {name: torch.tensor(values, dtype=dtype) for name, values in dpo["logps"].items()}
    lengths = torch.tensor(dpo["batch"]["completion_mask"]).sum(1)
    return PairLogps(
        logps["policy_chosen"],
        logps["policy_rejected"],
        logps["ref_chosen"],
        logps["ref_rejected"],
        lengths[: len(lengths) // 2],
        lengths[len(lengths) // 2 :],
    )


def pair(a: float, b: float, *, n_chosen: int = 1, n_rejected: int = 1) -> PairLogps:
    """One pair with these log-ratios, under a reference that gives probability e^-3 to each."""
    ref = torch.tensor([-3.0], dtype=torch.float64)
    return PairLogps(ref + a, ref + b, ref, ref, torch.tensor([n_chosen]), torch.tensor([n_rejected]))


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
@pytest.mark.parametrize("beta", [0.1, 0.5])
@pytest.mark.parametrize(("name", "loss", "options"), CASES, ids=[case[0] for case in CASES])
def test_losses_equal_those_of_trl(arch, beta, name, loss, options):
    kind, _, rest = name.partition("|")
    smoothing = f"|label_smoothing={options['label_smoothing']}" if "label_smoothing" in options else ""
    key = f"{kind}|beta={beta}{smoothing}" + (f"|{rest}" if rest else "")
    ours = loss(recorded(arch), beta=beta, **options).loss.mean()
    assert ours.item() == pytest.approx(TRL[arch]["dpo"]["losses"][key]["loss"], rel=1e-5)


@pytest.mark.parametrize("arch", ["llama", "gpt2"])
def test_rewards_in_the_log_equal_those_of_trl(arch):
    result, metrics = pairwise.sigmoid_loss(recorded(arch), beta=0.1), TRL[arch]["dpo"]["metrics"]
    assert result.chosen_rewards.mean().item() == pytest.approx(metrics["rewards/chosen"], rel=1e-5)
    assert result.rejected_rewards.mean().item() == pytest.approx(metrics["rewards/rejected"], rel=1e-5)
    accuracy = (result.chosen_rewards > result.rejected_rewards).double().mean().item()
    assert accuracy == metrics["rewards/accuracies"]


def test_an_untrained_policy_has_the_loss_of_a_coin():
    start = pair(0.0, 0.0)
    assert pairwise.sigmoid_loss(start, beta=0.1).loss.item() == pytest.approx(math.log(2), abs=1e-15)
    assert pairwise.conservative_loss(start, beta=0.1, label_smoothing=0.3).loss.item() == pytest.approx(math.log(2))
    assert pairwise.apo_zero_loss(start, beta=0.1).loss.item() == pytest.approx(1.0)
    assert pairwise.bco_loss(start, beta=0.1).loss.item() == pytest.approx(2 * math.log(2))


def test_each_formula_by_hand():
    beta, a, b = 0.5, 1.2, -0.4  # h = 0.8
    sigma = lambda x: 1 / (1 + math.exp(-x))  # noqa: E731
    h, both = beta * (a - b), pair(a, b, n_chosen=3, n_rejected=2)
    expected = {
        pairwise.sigmoid_loss: -math.log(sigma(h)),
        pairwise.hinge_loss: 1 - h,
        pairwise.ipo_loss: (a / 3 - b / 2 - 1) ** 2,
        pairwise.ipo_sum_loss: (a - b - 1) ** 2,
        pairwise.nca_loss: -math.log(sigma(beta * a)) - 0.5 * (math.log(sigma(-beta * a)) + math.log(sigma(-beta * b))),
        pairwise.sppo_loss: (a - 1) ** 2 + (b + 1) ** 2,
        pairwise.apo_down_loss: sigma(beta * a) + 1 - sigma(h),
        pairwise.dpop_loss: -math.log(sigma(h)),  # the chosen has not lost probability
    }
    for loss, value in expected.items():
        assert loss(both, beta=beta).loss.item() == pytest.approx(value, rel=1e-12), loss.__name__
    smoothed = pairwise.conservative_loss(both, beta=beta, label_smoothing=0.25).loss.item()
    assert smoothed == pytest.approx(-0.75 * math.log(sigma(h)) - 0.25 * math.log(sigma(-h)))
    p, e = sigma(h), 0.01
    exo = pairwise.exo_loss(both, beta=beta, label_smoothing=e).loss.item()
    assert exo == pytest.approx(p * math.log(p / (1 - e)) + (1 - p) * math.log((1 - p) / e))
    fallen = pairwise.dpop_loss(pair(-0.3, -2.0), beta=beta, penalty=5.0).loss.item()
    assert fallen == pytest.approx(-math.log(sigma(beta * (-0.3 + 2.0 - 5 * 0.3))))


@settings(deadline=None)
@given(a=numbers, b=numbers, epsilon=st.floats(0.0, 0.45))
def test_robust_and_conservative_losses_undo_the_noise_they_assume(a, b, epsilon):
    """The robust loss, averaged over labels flipped with probability e, is the plain loss under clean labels."""
    right, flipped = pair(a, b), pair(b, a)
    robust = [pairwise.robust_loss(p, beta=0.3, label_smoothing=epsilon).loss.item() for p in (right, flipped)]
    plain = [pairwise.sigmoid_loss(p, beta=0.3).loss.item() for p in (right, flipped)]
    assert (1 - epsilon) * robust[0] + epsilon * robust[1] == pytest.approx(plain[0], rel=1e-7, abs=1e-8)
    conservative = pairwise.conservative_loss(right, beta=0.3, label_smoothing=epsilon).loss.item()
    assert conservative == pytest.approx((1 - epsilon) * plain[0] + epsilon * plain[1], rel=1e-9, abs=1e-12)


@settings(deadline=None)
@given(a=numbers, b=numbers, shift=numbers)
def test_a_constant_added_to_both_answers_of_policy_and_reference_changes_nothing(a, b, shift):
    ref = torch.tensor([-3.0], dtype=torch.float64)
    n = torch.tensor([4])
    plain, moved = pair(a, b), PairLogps(ref + a + shift, ref + b + shift, ref + shift, ref + shift, n, n)
    for loss in (pairwise.sigmoid_loss, pairwise.hinge_loss, pairwise.ipo_sum_loss):
        assert loss(moved, beta=0.2).loss.item() == pytest.approx(loss(plain, beta=0.2).loss.item(), abs=1e-9)


def test_twice_the_tokens_double_the_margin_of_sums_and_leave_that_of_means():
    once, twice = pair(1.0, -1.0, n_chosen=3, n_rejected=4), pair(2.0, -2.0, n_chosen=6, n_rejected=8)
    assert pairwise.ipo_loss(once, beta=0.2).loss.item() == pytest.approx(
        pairwise.ipo_loss(twice, beta=0.2).loss.item()
    )
    normalised = [pairwise.normalised_sigmoid_loss(p, beta=0.2).loss.item() for p in (once, twice)]
    assert normalised[0] == pytest.approx(normalised[1])
    h = [-math.log(math.expm1(pairwise.sigmoid_loss(p, beta=0.2).loss.item())) for p in (once, twice)]
    assert h[1] == pytest.approx(2 * h[0])


def test_with_certain_labels_dpo_runs_away_and_ipo_stops_at_its_target():
    """IPO's minimum lies at a - b = 1 / (2 beta); DPO's at infinity (Azar et al. 2023, section 4)."""
    beta, gaps = 0.25, {}
    for loss in (pairwise.sigmoid_loss, pairwise.ipo_sum_loss):
        logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.Adam([logits], lr=0.1)
        one, ref = torch.ones(1, dtype=torch.int64), torch.full((1,), math.log(0.5), dtype=torch.float64)
        for _ in range(2000):
            logps = logits.log_softmax(0)
            optimizer.zero_grad()
            loss(PairLogps(logps[:1], logps[1:], ref, ref, one, one), beta=beta).loss.sum().backward()
            optimizer.step()
        gaps[loss] = (logits[0] - logits[1]).item()
    target = 1 / (2 * beta)
    assert gaps[pairwise.ipo_sum_loss] == pytest.approx(target, abs=1e-3)
    assert gaps[pairwise.sigmoid_loss] > 10 * target


@pytest.mark.parametrize(("name", "loss", "options"), ALL, ids=[case[0] for case in ALL])
def test_losses_are_finite_and_differentiable_far_out(name, loss, options):
    for a in (-200.0, 0.0, 200.0):
        for b in (-200.0, 200.0):
            leaf = torch.tensor([a, a], dtype=torch.float32, requires_grad=True)
            ref, n = torch.zeros(2), torch.tensor([3, 5])
            pairs = PairLogps(leaf, torch.tensor([b, b]), ref, ref, n, n)
            value = loss(pairs, beta=0.1, **options).loss.mean()
            value.backward()
            assert torch.isfinite(value)
            assert torch.isfinite(leaf.grad).all()


@pytest.mark.parametrize(("name", "loss", "options"), ALL, ids=[case[0] for case in ALL])
def test_gradients_agree_with_finite_differences(name, loss, options):
    torch.manual_seed(0)
    chosen, rejected = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    ref, n = torch.randn(2, 4, dtype=torch.float64), torch.tensor([3, 5, 1, 2])

    def value(chosen, rejected):
        return loss(PairLogps(chosen, rejected, ref[0], ref[1], n, n.flip(0)), beta=0.3, **options).loss.mean()

    assert torch.autograd.gradcheck(value, (chosen, rejected))


def test_settings_without_meaning_are_refused():
    both = pair(0.0, 0.0)
    with pytest.raises(ValueError, match=r"below 0\.5, got 0\.5"):
        pairwise.robust_loss(both, beta=0.1, label_smoothing=0.5)
    with pytest.raises(ValueError, match=r"between 0 and 1, got 0"):
        pairwise.exo_loss(both, beta=0.1, label_smoothing=0.0)
    with pytest.raises(ValueError, match="use that"):
        pairwise.alpha_divergence(1.0)


def test_length_desensitised_sums_weigh_what_lies_beyond_the_shorter_answer():
    logps = torch.tensor([[9.0, -1.0, -2.0, -4.0, 9.0], [-1.0, -1.0, -1.0, -1.0, -1.0]])
    mask = torch.tensor([[False, True, True, True, False], [True, True, True, True, True]])
    sums = pairwise.length_desensitised(logps, mask, torch.tensor([2, 4]), alpha=0.5)
    assert sums.tolist() == [-5.0, -4.5]
    whole = pairwise.length_desensitised(logps, mask, torch.tensor([2, 4]), alpha=1.0)
    assert whole.tolist() == [-7.0, -5.0]


def test_answers_drawn_from_the_policy_weigh_about_one_and_foreign_ones_nothing():
    """Under a uniform distribution over 8 tokens every token is as likely as a collision: the weight is exactly 1."""
    mask = torch.tensor([[True, True, True], [True, True, False]])
    uniform = torch.full((2, 3), -math.log(8))
    torch.testing.assert_close(pairwise.on_policy_weights(uniform, uniform, mask), torch.ones(2))
    foreign = pairwise.on_policy_weights(uniform - 20, uniform, mask)
    assert (foreign < 1e-8).all()
