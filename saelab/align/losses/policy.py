"""Losses of policy optimisation on sampled answers: PPO's clipped policy and value losses, and GRPO's."""

from __future__ import annotations

from typing import Literal, NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from saelab.align.masked import masked_mean

#: Log-ratios are cut here before exp: further off, a token says nothing but "far".
_LARGEST_LOG_RATIO = 20.0


class PolicyLoss(NamedTuple):
    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]
    """Share of tokens at which the clipped bound was the larger loss, or the ratio above its cap, detached."""
    approx_kl: Float[Tensor, ""]
    """Mean of (log-ratio)^2 / 2 between the sampling policy and this one over real tokens, detached, in nats."""


class ValueLoss(NamedTuple):
    loss: Float[Tensor, ""]
    clip_fraction: Float[Tensor, ""]


def ppo_policy_loss(
    logps: Float[Tensor, "batch seq"],
    old_logps: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    clip: float = 0.2,
) -> PolicyLoss:
    """-min(rho A, clip(rho, 1 - c, 1 + c) A), the mean over tokens (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
    log_ratio = _log_ratio(logps, old_logps, mask)
    plain, clipped = _surrogates(log_ratio, advantages, clip)
    return PolicyLoss(
        masked_mean(plain.maximum(clipped), mask),
        masked_mean((clipped > plain).to(plain.dtype), mask).detach(),
        masked_mean(log_ratio.square() / 2, mask).detach(),
    )


def ppo_value_loss(
    values: Float[Tensor, "batch seq"],
    old_values: Float[Tensor, "batch seq"],
    returns: Float[Tensor, "batch seq"],
    mask: Bool[Tensor, "batch seq"],
    *,
    clip: float = 0.2,
) -> ValueLoss:
    """max((V - R)^2, (V_clipped - R)^2) / 2, the mean over tokens, V_clipped within ``clip`` of the old value.

    As in the code of Stiennon et al. 2020; the clip keeps the value head from moving faster than the policy.
    """
    clipped = old_values + (values - old_values).clamp(-clip, clip)
    plain_error, clipped_error = (values - returns).square(), (clipped - returns).square()
    return ValueLoss(
        0.5 * masked_mean(plain_error.maximum(clipped_error), mask),
        masked_mean((clipped_error > plain_error).to(values.dtype), mask).detach(),
    )


#: How the tokens of a batch become one number: the mean of the answers' means (GRPO), the mean over all tokens (DAPO),
#: or a division by a constant length, so that long answers are not favoured (Dr. GRPO).
Aggregation = Literal["sequences", "tokens", "constant"]


#: PPO's clipped ratio, or CISPO's: the gradient of log pi at every token, weighed by a ratio that is only cut above.
Surrogate = Literal["clipped", "cispo"]


def grpo_loss(
    logps: Float[Tensor, "batch seq"],
    old_logps: Float[Tensor, "batch seq"],
    advantages: Float[Tensor, " batch"],
    mask: Bool[Tensor, "batch seq"],
    *,
    clip: float = 0.2,
    surrogate: Surrogate = "clipped",
    ratio_cap: float = 5.0,
    kl: Float[Tensor, "batch seq"] | None = None,
    beta: float = 0.0,
    aggregation: Aggregation = "sequences",
    ratio_of: Literal["token", "sequence"] = "token",
) -> PolicyLoss:
    """The clipped loss with one advantage an answer, plus ``beta * kl`` (Shao et al. 2024, arXiv 2402.03300, eq. 3).

    ``ratio_of="sequence"`` takes the geometric mean of an answer's token ratios for all of its tokens (GSPO, arXiv
    2507.18071). "constant" divides by the padded length ``seq`` of each answer. ``surrogate="cispo"`` is -sg(min(rho,
    ratio_cap)) A log pi (MiniMax 2025, arXiv 2506.13585, eq. 4): a token whose ratio has gone far keeps its gradient,
    which clipping would take from it.
    """
    log_ratio = _log_ratio(logps, old_logps, mask)
    if ratio_of == "sequence":
        log_ratio = (log_ratio.sum(1) / mask.sum(1).clamp_min(1))[:, None].expand_as(log_ratio)
    if surrogate == "cispo":
        ratio = log_ratio.detach().exp()
        loss = -ratio.clamp(max=ratio_cap) * advantages[:, None] * logps
        limited = ratio > ratio_cap
    else:
        plain, clipped = _surrogates(log_ratio, advantages[:, None], clip)
        loss, limited = plain.maximum(clipped), clipped > plain
    if kl is not None:
        loss = loss + beta * kl
    return PolicyLoss(
        _aggregated(loss, mask, aggregation),
        masked_mean(limited.to(loss.dtype), mask).detach(),
        masked_mean(log_ratio.square() / 2, mask).detach(),
    )


def _log_ratio(
    logps: Float[Tensor, "batch seq"], old_logps: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"]
) -> Float[Tensor, "batch seq"]:
    return (logps - old_logps).where(mask, 0.0).clamp(-_LARGEST_LOG_RATIO, _LARGEST_LOG_RATIO)


def _surrogates(
    log_ratio: Float[Tensor, "batch seq"],
    advantages: Float[
        Tensor,
        (
            batch  # seq
        ),
    ],
    clip: float,
) -> tuple[Float[Tensor, "batch seq"], Float[Tensor, "batch seq"]]:
    """-rho A, and the same with rho clipped."""
    ratio = log_ratio.exp()
    return -advantages * ratio, -advantages * ratio.clamp(1 - clip, 1 + clip)


def _aggregated(
    loss: Float[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"], aggregation: Aggregation
) -> Float[Tensor, ""]:
    loss = loss.where(mask, 0.0)
    match aggregation:
        case "sequences":
            return (loss.sum(1) / mask.sum(1).clamp_min(1)).mean()
        case "tokens":
            return loss.sum() / mask.sum().clamp_min(1)
        case "constant":
            return loss.sum() / mask.numel()
