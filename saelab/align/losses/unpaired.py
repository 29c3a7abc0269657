"""Losses on single completions that are labelled good or bad."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saelab.align.losses.pairwise import PreferenceLoss


def kto_baseline(mismatched_ratios: Float[Tensor, " batch"]) -> Float[Tensor, ""]:
    """z = max(0, mean log-ratio of completions to other prompts), detached: KTO's estimate of KL(pi || ref).

    Ethayarajh et al. 2024, arXiv 2402.01306, section 4.1. ``mismatched_ratios`` are log pi - log ref of completions
    paired with the prompt of another example of the batch.

    Raises:
        ValueError: a batch of one, which has no other prompt.
    """
    if len(mismatched_ratios) < 2:
        raise ValueError(f"KTO needs at least 2 examples a batch to estimate the KL, got {len(mismatched_ratios)}")
    return mismatched_ratios.detach().mean().clamp_min(0)


def kto_loss(
    ratios: Float[Tensor, " batch"],
    desirable: Bool[Tensor, " batch"],
    baseline: Float[Tensor, ""],
    *,
    beta: float,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> PreferenceLoss:
    """w_D (1 - sigma(beta (ratio - z))) for the good, w_U (1 - sigma(beta (z - ratio))) for the bad.

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8. ``ratios`` are log pi - log ref of each completion, z is
    ``baseline``. The rewards of examples of the other kind are NaN.
    """
    value = (beta * torch.where(desirable, ratios - baseline, baseline - ratios)).sigmoid()
    weight = torch.where(desirable, desirable_weight, undesirable_weight)
    return _labelled(weight * (1 - value), ratios, desirable, beta)


def apo_zero_unpaired_loss(
    ratios: Float[Tensor, " batch"], desirable: Bool[Tensor, " batch"], *, beta: float
) -> PreferenceLoss:
    """1 - sigma(beta ratio) for the good, sigma(beta ratio) for the bad (APO zero, arXiv 2408.06266)."""
    good = (beta * ratios).sigmoid()
    return _labelled(torch.where(desirable, 1 - good, good), ratios, desirable, beta)


def _labelled(
    loss: Float[Tensor, " batch"], ratios: Float[Tensor, " batch"], desirable: Bool[Tensor, " batch"], beta: float
) -> PreferenceLoss:
    rewards = beta * ratios.detach()
    return PreferenceLoss(loss, rewards.where(desirable, torch.nan), rewards.where(~desirable, torch.nan))
