"""The reward model's loss."""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import softplus


class RewardLoss(NamedTuple):
    loss: Float[Tensor, " batch"]
    margins: Float[Tensor, " batch"]
    """reward(chosen) - reward(rejected), detached; above 0 the model agrees with the label."""


def bradley_terry_loss(
    chosen_rewards: Float[Tensor, " batch"],
    rejected_rewards: Float[Tensor, " batch"],
    *,
    margin: Float[Tensor, " batch"] | float = 0.0,
    centring: float = 0.0,
) -> RewardLoss:
    """-log sigma(r_w - r_l - margin) + centring (r_w + r_l)^2.

    Bradley and Terry 1952 with the margin of Llama 2 (arXiv 2307.09288, eq. 2); the second term keeps rewards near 0,
    which the first leaves free (Eisenstein et al. 2023, arXiv 2312.09244, eq. 3).
    """
    difference = chosen_rewards - rejected_rewards
    loss = softplus(margin - difference) + centring * (chosen_rewards + rejected_rewards).square()
    return RewardLoss(loss, difference.detach())
