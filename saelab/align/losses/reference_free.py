"""Losses on preference pairs that need no reference model: SimPO, CPO, ORPO."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import logsigmoid, softplus

from saelab.align.losses.pairwise import PreferenceLoss


def simpo_loss(
    chosen_logps: Float[Tensor, " batch"],
    rejected_logps: Float[Tensor, " batch"],
    n_chosen: Int[Tensor, " batch"],
    n_rejected: Int[Tensor, " batch"],
    *,
    beta: float,
    gamma: float,
) -> PreferenceLoss:
    """-log sigma(beta (mean logp_w - mean logp_l) - gamma) (Meng et al. 2024, arXiv 2405.14734, eq. 6).

    The means are over the tokens of the completion; ``gamma`` is the margin that the chosen shall win by.
    """
    chosen, rejected = beta * chosen_logps / n_chosen, beta * rejected_logps / n_rejected
    return PreferenceLoss(softplus(gamma - (chosen - rejected)), chosen.detach(), rejected.detach())


def cpo_loss(
    chosen_logps: Float[Tensor, " batch"],
    rejected_logps: Float[Tensor, " batch"],
    n_chosen: Int[Tensor, " batch"],
    *,
    beta: float,
    alpha: float = 1.0,
    mean_length: float | None = None,
) -> PreferenceLoss:
    """-log sigma(beta (logp_w - logp_l)) + alpha NLL(chosen) (Xu et al. 2024, arXiv 2401.08417, eq. 5).

    The log-probabilities are sums, the NLL is a token's; its mean over the batch weighs all tokens alike.
    ``mean_length`` is that of the chosen answers of the whole batch, where these are a part of it.
    """
    chosen, rejected = beta * chosen_logps, beta * rejected_logps
    nll = -chosen_logps / (mean_length or float(n_chosen.double().mean()))
    return PreferenceLoss(softplus(rejected - chosen) + alpha * nll, chosen.detach(), rejected.detach())


class OddsRatioLoss(NamedTuple):
    loss: Float[Tensor, " batch"]
    chosen_rewards: Float[Tensor, " batch"]
    rejected_rewards: Float[Tensor, " batch"]
    log_odds_ratio: Float[Tensor, " batch"]
    """log sigma(log odds(chosen) - log odds(rejected)), detached."""


def orpo_loss(
    nll: Float[Tensor, " batch"],
    chosen_logps: Float[Tensor, " batch"],
    rejected_logps: Float[Tensor, " batch"],
    n_chosen: Int[Tensor, " batch"],
    n_rejected: Int[Tensor, " batch"],
    *,
    beta: float,
) -> OddsRatioLoss:
    """NLL(chosen) - beta log sigma(log odds_w - log odds_l) (Hong et al. 2024, arXiv 2403.07691, eq. 6 and 7).

    odds = p / (1 - p) with p the geometric mean of the completion's token probabilities. ``nll`` is that of the chosen
    sequence, prompt included, for each pair (see ``token_mean``).
    """
    chosen, rejected = chosen_logps / n_chosen, rejected_logps / n_rejected
    log_odds = (chosen - rejected) - (log1mexp(chosen) - log1mexp(rejected))
    ratio = logsigmoid(log_odds)
    return OddsRatioLoss(nll - beta * ratio, beta * chosen.detach(), beta * rejected.detach(), ratio.detach())


def log1mexp(logp: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """log(1 - exp(logp)) for logp <= 0 without cancellation: near 0 by expm1, far from it by log1p (Mächler 2012).

    At logp = 0 it is taken at the largest number below, so that the odds of a certain answer stay finite.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).tiny)
    near = logp > -math.log(2)
    # the branch not taken is fed a harmless number: its gradient would be 0 times infinity
    close = torch.log(-torch.expm1(torch.where(near, logp, -1.0)))
    far = torch.log1p(-torch.exp(torch.where(near, -1.0, logp)))
    return torch.where(near, close, far)
