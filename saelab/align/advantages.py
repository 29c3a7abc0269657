"""From scores of whole answers to an advantage for each token: KL penalty, GAE, and the baselines of a group."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

KLEstimator = Literal["k1", "k2", "k3"]


def kl_estimate(
    logps: Float[Tensor, "batch seq"], ref_logps: Float[Tensor, "batch seq"], *, estimator: KLEstimator = "k1"
) -> Float[Tensor, "batch seq"]:
    """KL(policy || reference) of each sampled token in nats, with d = log pi - log ref (Schulman 2020).

    k1 = d and k3 = exp(-d) - 1 + d are unbiased, k2 = d^2 / 2 is biased. As a *loss*, k2 has the gradient of the KL, k1
    has an expected gradient of 0 and k3 that of the forward KL (Liu et al. 2025, "Rethinking KL Regularization").
    """
    d = logps - ref_logps
    match estimator:
        case "k1":
            return d
        case "k2":
            return d.square() / 2
        case "k3":
            return torch.expm1((-d).clamp(max=80.0)) + d


def token_rewards(
    kl: Float[Tensor, "batch seq"],
    scores: Float[Tensor, " batch"],
    last: Int[Tensor, " batch"],
    mask: Bool[Tensor, "batch seq"],
    *,
    beta: float,
) -> Float[Tensor, "batch seq"]:
    """-beta kl at each token, plus the answer's score at its token ``last``; 0 outside ``mask``.

    Stiennon et al. 2020, arXiv 2009.01325, section 3.4. ``last`` is the place of the last generated token (EOS too).
    """
    rewards = (-beta * kl).where(mask, 0.0)
    return rewards.scatter_add(1, last[:, None], scores[:, None].to(rewards.dtype))


class Advantages(NamedTuple):
    advantages: Float[Tensor, "batch seq"]
    returns: Float[Tensor, "batch seq"]
    """What the value head shall predict."""


def gae(
    rewards: Float[Tensor, "batch seq"],
    values: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Advantages:
    """Generalised advantage estimation (Schulman et al. 2015, arXiv 1506.02438, eq. 16), not yet whitened.

    A_t = delta_t + gamma lam A_(t+1) with delta_t = r_t + gamma V_(t+1) - V_t; behind the last token the value is 0.
    Outside ``mask`` everything is 0, so the length of the padding changes nothing.
    """
    rewards, values = rewards.where(mask, 0.0), values.where(mask, 0.0)
    advantage, next_value = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0])
    reversed_advantages = []
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * advantage
        next_value = values[:, t]
        reversed_advantages.append(advantage)
    advantages = torch.stack(reversed_advantages[::-1], dim=1).where(mask, 0.0)
    return Advantages(advantages, advantages + values)


def leave_one_out(scores: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
    """Each score minus the mean of the others to the same prompt: RLOO (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8).

    Raises:
        ValueError: one sample a prompt, which leaves no others.
    """
    n = scores.shape[1]
    if n < 2:
        raise ValueError(f"leave-one-out needs at least 2 samples a prompt, got {n}; raise the number of samples")
    return (scores - scores.mean(1, keepdim=True)) * n / (n - 1)


def group_normalised(
    scores: Float[Tensor, "prompts samples"], *, divide_by_std: bool = True
) -> Float[Tensor, "prompts samples"]:
    """Scores relative to their group's mean, over its standard deviation: GRPO (arXiv 2402.03300, section 4.1.2).

    Without the division it is Dr. GRPO (Liu et al. 2025, arXiv 2503.20783). Equal scores give 0.

    Raises:
        ValueError: one sample a prompt.
    """
    if scores.shape[1] < 2:
        raise ValueError(
            f"a group needs at least 2 samples a prompt, got {scores.shape[1]}; raise the number of samples"
        )
    centred = scores - scores.mean(1, keepdim=True)
    return centred / (scores.std(1, keepdim=True) + 1e-4) if divide_by_std else centred
