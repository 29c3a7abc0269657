"""Every method against the optimum that mathematics gives it: a bandit of 4 prompts and 8 answers, exactly solvable.

KL-regularised reward has its optimum at pi* = ref exp(r / beta) / Z. What a method with another objective converges to
is another closed form, and is tested as well: a KL penalty at the wrong place is no smaller KL penalty.
"""

import pytest
import torch

from saelab.align.advantages import gae, group_normalised, kl_estimate, leave_one_out, token_rewards
from saelab.align.losses.pairwise import PairLogps, ipo_sum_loss, sigmoid_loss
from saelab.align.losses.policy import ppo_policy_loss, ppo_value_loss
from saelab.align.masked import whiten

N_PROMPTS, N_ANSWERS, N_SAMPLES, BETA = 4, 8, 64, 0.5
REAL = torch.ones(N_PROMPTS * N_SAMPLES, 1, dtype=torch.bool)


def problem() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ref = torch.randn(N_PROMPTS, N_ANSWERS, generator=generator).log_softmax(1)
    return ref, torch.randn(N_PROMPTS, N_ANSWERS, generator=generator)


REF, REWARD = problem()
OPTIMUM = (REF + REWARD / BETA).log_softmax(1)


def distance(logits: torch.Tensor, optimum: torch.Tensor = OPTIMUM) -> float:
    """The largest KL(pi || optimum) of a prompt, in nats."""
    logps = logits.log_softmax(1)
    return (logps.exp() * (logps - optimum)).sum(1).max().item()


def trained(loss, *, steps: int, lr: float, seed: int = 0, start: torch.Tensor = REF) -> torch.Tensor:
    """The logits after Adam on ``loss(logits, generator)``, the learning rate falling to 0."""
    logits, generator = start.clone().requires_grad_(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([logits], lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(logits, generator).backward()
        optimizer.step()
        schedule.step()
    return logits.detach()


def sampled(logps: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    return torch.multinomial(logps.detach().exp(), N_SAMPLES, replacement=True, generator=generator)


def grouped(*, advantage, kl_in_reward: bool = True, kl_loss: str | None = None, beta: float = BETA):
    """REINFORCE with a group's baseline; the KL penalty within the reward, or as a term of the loss, or not at all."""

    def loss(logits, generator):
        logps = logits.log_softmax(1)
        answers = sampled(logps, generator)
        chosen, ref = logps.gather(1, answers), REF.gather(1, answers)
        scores = REWARD.gather(1, answers)
        if kl_in_reward:
            scores = scores - beta * kl_estimate(chosen.detach(), ref)
        value = -(advantage(scores) * chosen).mean()
        return value + beta * kl_estimate(chosen, ref, estimator=kl_loss).mean() if kl_loss else value

    return loss


def dr_grpo(scores):
    return group_normalised(scores, divide_by_std=False)


class PPO:
    """Four epochs of clipped steps on each batch, a value for each prompt, the KL penalty within the reward."""

    def __init__(self, *, beta: float = BETA):
        self.beta = beta

    def run(self, *, steps: int, seed: int, lr: float = 0.05) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        logits, values = REF.clone().requires_grad_(), torch.zeros(N_PROMPTS, requires_grad=True)
        optimizer = torch.optim.Adam([logits, values], lr=lr)
        for step in range(steps):
            optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
            old = logits.detach().log_softmax(1)
            answers = sampled(old, generator)
            flat = [x.gather(1, answers).reshape(-1, 1) for x in (old, REF, REWARD)]
            old_values = values.detach()[:, None].expand_as(answers).reshape(-1, 1)
            last = torch.zeros(len(REAL), dtype=torch.int64)
            rewards = token_rewards(kl_estimate(flat[0], flat[1]), flat[2][:, 0], last, REAL, beta=self.beta)
            advantages, returns = gae(rewards, old_values, REAL)
            advantages = whiten(advantages, REAL)
            for _ in range(4):
                logps = logits.log_softmax(1).gather(1, answers).reshape(-1, 1)
                predicted = values[:, None].expand_as(answers).reshape(-1, 1)
                policy = ppo_policy_loss(logps, flat[0], advantages, REAL)
                value = ppo_value_loss(predicted, old_values, returns, REAL)
                optimizer.zero_grad()
                (policy.loss + 0.1 * value.loss).backward()
                optimizer.step()
        return logits.detach()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_ppo_reaches_the_optimum(seed):
    assert distance(PPO().run(steps=600, seed=seed)) < 1e-3


def test_ppo_with_the_kl_penalty_reversed_does_not():
    assert distance(PPO(beta=-BETA).run(steps=300, seed=0)) > 1


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_rloo_reaches_the_optimum(seed):
    assert distance(trained(grouped(advantage=leave_one_out), steps=2500, lr=0.05, seed=seed)) < 1e-3


def test_group_baselines_reach_the_optimum():
    assert distance(trained(grouped(advantage=dr_grpo), steps=600, lr=0.05)) < 2e-2
    assert distance(trained(grouped(advantage=group_normalised), steps=600, lr=0.05)) < 1e-2


def test_the_exact_gradient_reaches_the_optimum():
    def loss(logits, _):
        logps = logits.log_softmax(1)
        return -(logps.exp() * (REWARD - BETA * (logps - REF))).sum(1).mean()

    assert distance(trained(loss, steps=1000, lr=0.1)) < 2e-3


def test_a_kl_penalty_as_loss_works_as_k2_alone():
    """k1 has no gradient on average, so the policy collapses onto the best answer as with beta = 0."""
    far = {
        kind: distance(trained(grouped(advantage=leave_one_out, kl_in_reward=False, kl_loss=kind), steps=600, lr=0.05))
        for kind in ("k1", "k2")
    }
    unregularised = grouped(advantage=leave_one_out, kl_in_reward=False, beta=0.0)
    collapsed = distance(trained(unregularised, steps=600, lr=0.05))
    assert far["k2"] < 2e-2
    assert far["k1"] > 1
    assert far["k1"] == pytest.approx(collapsed, rel=0.1)


def test_k3_as_a_loss_has_the_optimum_of_the_forward_kl():
    """Stationary where beta ref / pi = lambda - r: pi = beta ref / (lambda - r), with lambda so that it sums to 1."""
    low = REWARD.max(1, keepdim=True).values
    high = low + BETA * N_ANSWERS
    for _ in range(100):
        middle = (low + high) / 2
        too_much = (BETA * REF.exp() / (middle - REWARD)).sum(1, keepdim=True) > 1
        low, high = torch.where(too_much, middle, low), torch.where(too_much, high, middle)
    forward = (BETA * REF.exp() / (high - REWARD)).log()
    reached = trained(grouped(advantage=leave_one_out, kl_in_reward=False, kl_loss="k3"), steps=2500, lr=0.05)
    assert distance(reached, forward.log_softmax(1)) < 1e-3
    assert distance(reached) > 0.2


def test_the_group_deviation_devours_a_kl_loss():
    """Rewards over their deviation, the penalty not: as the policy sharpens, the penalty's weight goes to 0."""
    for kind in ("k2", "k3"):
        loss = grouped(advantage=group_normalised, kl_in_reward=False, kl_loss=kind)
        assert distance(trained(loss, steps=600, lr=0.05)) > 0.5


# --- preferences: the expectation over all pairs, labelled as Bradley and Terry say

PREFERRED = (REWARD[:, :, None] - REWARD[:, None, :]).sigmoid()  # [prompts, winner, loser]


def expected_over_pairs(loss, weights):
    """The mean of a pairwise loss over all ordered pairs of answers, weighted."""
    n = torch.ones(weights.numel(), dtype=torch.int64)

    def value(logits, _):
        logps = logits.log_softmax(1)
        columns = [x[:, :, None].expand_as(weights).reshape(-1) for x in (logps, REF)]
        rows = [x[:, None, :].expand_as(weights).reshape(-1) for x in (logps, REF)]
        pairs = PairLogps(columns[0], rows[0], columns[1], rows[1], n, n)
        return (weights.reshape(-1) * loss(pairs, beta=BETA).loss).sum() / N_PROMPTS

    return value


def test_dpo_reaches_the_optimum_of_the_reward_it_never_sees():
    assert distance(trained(expected_over_pairs(sigmoid_loss, PREFERRED), steps=1500, lr=0.05)) < 1e-5


def test_ipo_reaches_its_own_optimum_and_not_that_of_dpo():
    """ref exp(P(answer beats an answer at random) / beta), where an answer ties with itself (2310.12036, eq. 10)."""
    own = (REF + PREFERRED.mean(2) / BETA).log_softmax(1)
    reached = trained(expected_over_pairs(ipo_sum_loss, PREFERRED), steps=1500, lr=0.05)
    assert distance(reached, own) < 1e-5
    assert distance(reached) > 0.5


def test_more_pairs_bring_dpo_closer():
    generator, reached = torch.Generator().manual_seed(0), []
    for n_pairs in (300, 3_000, 30_000):
        first, second = torch.randint(N_ANSWERS, (2, N_PROMPTS, n_pairs), generator=generator)
        prompts = torch.arange(N_PROMPTS)[:, None]
        first_wins = torch.rand(N_PROMPTS, n_pairs, generator=generator) < PREFERRED[prompts, first, second]
        counts = torch.zeros_like(PREFERRED)
        winner, loser = torch.where(first_wins, first, second), torch.where(first_wins, second, first)
        counts.index_put_((prompts.expand_as(winner), winner, loser), torch.ones(winner.shape), accumulate=True)
        reached.append(distance(trained(expected_over_pairs(sigmoid_loss, counts / n_pairs), steps=800, lr=0.05)))
    assert reached[0] > reached[1] > reached[2]
