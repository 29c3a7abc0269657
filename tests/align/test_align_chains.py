"""The same on sequences: a chain of tokens whose optimum is a chain as well, all of its sequences enumerated."""

import itertools

import pytest
import torch

from saelab.align.advantages import gae, group_normalised, kl_estimate, leave_one_out, token_rewards
from saelab.align.losses.pairwise import PairLogps, sigmoid_loss
from saelab.align.losses.policy import ppo_policy_loss, ppo_value_loss
from saelab.align.masked import whiten

LENGTH, N_TOKENS, BETA = 3, 4, 0.5
START = N_TOKENS  # what stands before the first token


def problem():
    generator = torch.Generator().manual_seed(0)
    ref = (0.7 * torch.randn(LENGTH, N_TOKENS + 1, N_TOKENS, generator=generator)).log_softmax(-1)
    return ref, 0.6 * torch.randn(LENGTH, N_TOKENS + 1, N_TOKENS, generator=generator)


REF, REWARD = problem()
FIXED = torch.tensor(list(itertools.product(range(N_TOKENS), repeat=LENGTH)))  # 64 sequences
#: The same where token 0 ends the sequence: all of length 1 to 3, padded with it.
RAGGED = torch.stack(
    [seq for seq in FIXED if all(later == 0 for first, later in itertools.pairwise(seq) if first == 0)]
)


def masks(sequences, *, ragged):
    """True up to the end: the first token 0, itself included."""
    if not ragged:
        return torch.ones_like(sequences, dtype=torch.bool)
    return (sequences == 0).cumsum(1) - (sequences == 0).long() == 0


def by_token(table, sequences):
    """The table's entries along each sequence: [batch, length]."""
    before = torch.cat([torch.full_like(sequences[:, :1], START), sequences[:, :-1]], 1)
    return table[torch.arange(LENGTH), before, sequences]


def enumerated(logits, *, ragged):
    sequences = RAGGED if ragged else FIXED
    mask = masks(sequences, ragged=ragged)
    return (by_token(logits.log_softmax(-1), sequences) * mask).sum(1), (by_token(REWARD, sequences) * mask).sum(1)


def distance(logits, *, ragged):
    """KL(pi || pi*) in nats, over all sequences."""
    logps, rewards = enumerated(logits, ragged=ragged)
    ref, _ = enumerated(REF, ragged=ragged)
    optimum = (ref + rewards / BETA).log_softmax(0)
    return (logps.exp() * (logps - optimum)).sum().item()


def drawn(logps, generator, *, n, ragged):
    tokens, before = [], torch.full((n,), START)
    ended = torch.zeros(n, dtype=torch.bool)
    for t in range(LENGTH):
        token = torch.multinomial(logps[t, before].exp(), 1, generator=generator)[:, 0]
        if ragged:
            token = token.masked_fill(ended, 0)
            ended |= token == 0
        tokens.append(token)
        before = token
    return torch.stack(tokens, 1)


def run(loss, *, steps, lr, parameters):
    optimizer = torch.optim.Adam(parameters, lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("ragged", [False, True])
def test_the_probabilities_of_all_sequences_add_up_to_one(ragged):
    assert enumerated(torch.randn_like(REF), ragged=ragged)[0].exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("ragged", [False, True])
def test_dpo_reaches_the_tilted_chain(ragged):
    logits = REF.clone().requires_grad_()
    ref, rewards = enumerated(REF, ragged=ragged)
    n = torch.ones(len(ref) ** 2, dtype=torch.int64)
    weights = (ref[:, None] + ref).exp() * (rewards[:, None] - rewards).sigmoid()

    def loss():
        logps, _ = enumerated(logits, ragged=ragged)
        first, second = (x[:, None].expand_as(weights).reshape(-1) for x in (logps, ref))
        third, fourth = (x.expand_as(weights).reshape(-1) for x in (logps, ref))
        return (weights.reshape(-1) * sigmoid_loss(PairLogps(first, third, second, fourth, n, n), beta=BETA).loss).sum()

    run(loss, steps=800, lr=0.05, parameters=[logits])
    assert distance(logits.detach(), ragged=ragged) < 1e-5


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("advantage", [leave_one_out, group_normalised])
def test_policy_gradients_with_a_groups_baseline_reach_it(advantage, ragged):
    logits, generator = REF.clone().requires_grad_(), torch.Generator().manual_seed(0)

    def loss():
        sequences = drawn(logits.detach().log_softmax(-1), generator, n=256, ragged=ragged)
        mask = masks(sequences, ragged=ragged)
        logps, ref, rewards = (by_token(x, sequences) * mask for x in (logits.log_softmax(-1), REF, REWARD))
        scores = rewards.sum(1) - BETA * kl_estimate(logps.detach(), ref).sum(1)
        return -(advantage(scores[None])[0] * logps.sum(1)).mean()

    run(loss, steps=800, lr=0.05, parameters=[logits])
    assert distance(logits.detach(), ragged=ragged) < 2e-3


def ppo(*, lam, seed, ragged, steps=400, lr=0.05):
    logits, values = REF.clone().requires_grad_(), torch.zeros(LENGTH, N_TOKENS + 1, requires_grad=True)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([logits, values], lr=lr)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        old = logits.detach().log_softmax(-1)
        sequences = drawn(old, generator, n=256, ragged=ragged)
        mask = masks(sequences, ragged=ragged)
        before = torch.cat([torch.full_like(sequences[:, :1], START), sequences[:, :-1]], 1)
        old_logps, old_values = by_token(old, sequences), values.detach()[torch.arange(LENGTH), before]
        scores = (by_token(REWARD, sequences) * mask).sum(1)
        kl = kl_estimate(old_logps, by_token(REF, sequences))
        rewards = token_rewards(kl, scores, mask.sum(1) - 1, mask, beta=BETA)
        advantages, returns = gae(rewards, old_values, mask, lam=lam)
        advantages = whiten(advantages, mask)
        for _ in range(4):
            policy = ppo_policy_loss(by_token(logits.log_softmax(-1), sequences), old_logps, advantages, mask)
            value = ppo_value_loss(values[torch.arange(LENGTH), before], old_values, returns, mask)
            optimizer.zero_grad()
            (policy.loss + 0.1 * value.loss).backward()
            optimizer.step()
    return distance(logits.detach(), ragged=ragged)


@pytest.mark.parametrize("ragged", [False, True])
def test_ppo_reaches_it_token_by_token(ragged):
    assert ppo(lam=1.0, seed=0, ragged=ragged) < 1e-2


def test_a_value_head_that_lags_biases_a_short_horizon():
    """With lam below 1 the advantage leans on the values, which are still wrong; with 1 it does not."""
    far = [ppo(lam=lam, seed=1, ragged=False, steps=200) for lam in (1.0, 0.5)]
    assert far[0] < far[1]
